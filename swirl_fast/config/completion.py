"""Shell completion, as a script that holds all words: commands, their options, the keys of settings with the words they accept, and the
names of shipped files. Nothing of this package runs when a key is pressed.

    source <(swirl-fast completion bash)            zsh: the same;  fish: swirl-fast completion fish | source
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from swirl_fast.config.fields import Setting, settings
from swirl_fast.config.schema import Config
from swirl_fast.config.shipped import shipped

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_swirl_fast() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" key="" before="" words=""
    COMPREPLY=()
    if [[ $cur == "=" ]]; then key="$prev" cur=""
    elif [[ $prev == "=" ]]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ $cur == *=* ]]; then key="${{cur%%=*}}" before="${{cur%%=*}}=" cur="${{cur#*=}}"
    fi
    if [[ -n $key ]]; then
        case "$key" in
{values}
        esac
        COMPREPLY=($(compgen -P "$before" -W "$words" -- "$cur"))
        [[ -n $words ]] || COMPREPLY=($(compgen -P "$before" -f -- "$cur"))
        return
    fi
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
        return
    fi
    case "$prev" in
        --config) COMPREPLY=($(compgen -W "{configs}" -- "$cur") $(compgen -f -- "$cur")); return ;;
        experiment) COMPREPLY=($(compgen -W "{experiments}" -- "$cur") $(compgen -f -- "$cur")); return ;;
    esac
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace 2>/dev/null
    return 0
}}
complete -F _swirl_fast swirl-fast
"""


def script(shell: str, commands: Mapping[str, Sequence[str]]) -> str:
    """The script of one of SHELLS. commands: name -> its options and fixed words, without settings where it takes none."""
    if shell == "fish":
        return _fish(commands)
    bash = _BASH.format(
        commands=" ".join(commands),
        configs=" ".join(shipped("config")),
        experiments=" ".join(shipped("experiment")),
        values="\n".join(f'            {key}) words="{words}" ;;' for key, words in _values().items()),
        options="\n".join(f'        {name}) words="{" ".join(words)}" ;;' for name, words in commands.items()),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash}" if shell == "zsh" else bash


def keys() -> list[str]:
    """All settings as they are begun on a command line: `training.steps=`."""
    return [f"{key}=" for key in settings(Config)]


def _values() -> dict[str, str]:
    """Key -> the words that it accepts, where they are listed."""
    found = {key: _words(entry) for key, entry in settings(Config).items()}
    found["model.chat_template"] = tuple(shipped("template"))
    return {key: " ".join(words) for key, words in found.items() if words}


def _words(entry: Setting) -> tuple[str, ...]:
    if entry.plain_kind is bool:
        return ("true", "false")
    return tuple(str(word) for word in entry.words or entry.known if word != "")


def _fish(commands: Mapping[str, Sequence[str]]) -> str:
    names = " ".join(commands)
    lines = [f"complete -c swirl-fast -n 'not __fish_seen_subcommand_from {names}' -fa '{names}'"]
    for name, words in commands.items():
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        lines += [f"complete -c swirl-fast {seen} -l {word.removeprefix('--')}" for word in words if word[:2] == "--"]
        if plain := " ".join(word for word in words if word[:1] != "-"):
            lines.append(f"complete -c swirl-fast {seen} -a '{plain}'")
    lines.append(f"complete -c swirl-fast -l config -ra '{' '.join(shipped('config'))}'")
    lines.append(
        f"complete -c swirl-fast -n '__fish_seen_subcommand_from experiment' -a '{' '.join(shipped('experiment'))}'"
    )
    for key, values in _values().items():
        lines.append(f"complete -c swirl-fast -a '{' '.join(f'{key}={value}' for value in values.split())}'")
    return "\n".join(lines) + "\n"
