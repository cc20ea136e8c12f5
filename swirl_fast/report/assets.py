"""The style sheet and the script of the report, which is one file: both go into it as they stand here."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #faf9f6; --card: #ffffff; --sunk: #f3f2ed; --line: #dedbd3; --text: #1c2126; --soft: #59616b; --link:
  #1f5aa6;
  --s0: #1f66b5; --s1: #c4541a; --s2: #1b7f5c; --s3: #7a4ca5; --s4: #9a7400; --s5: #157a8a; --s6: #b23a6b; --s7:
  #6d7580;
  --good: #176b45; --good-back: #e0f2e8; --bad: #a42a24; --bad-back: #fbe6e4; --odd: #755600; --odd-back: #faf0d2;
  --mark: #fdf1c9; --grid: #e7e5de;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --sunk: #24292e; --line: #363c43; --text: #e4e6e8; --soft: #a2abb5; --link:
    #84b8f5;
    --s0: #6db0f2; --s1: #f2945c; --s2: #5fcaa0; --s3: #bd98ea; --s4: #d8b23f; --s5: #5cc5d6; --s6: #ec86b0; --s7:
    #9aa3ae;
    --good: #7fd8ac; --good-back: #17382a; --bad: #ff9d94; --bad-back: #45211f; --odd: #e6c46a; --odd-back: #3b3115;
    --mark: #4a3f17; --grid: #2c3238;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; }
section > h3 { margin: 1.75rem 0 .15rem; font-size: 1.08rem; }
h4 { font-size: .95rem; margin: 0; }
p { margin: 0 0 .6rem; max-width: 46rem; }
small { font-weight: 400; font-size: .8rem; color: var(--soft); }
a { color: var(--link); }
:is(a, summary, input, select, button, .plot, .wide):focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px; border-radius: 4px;
}
code, .text, .config { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .88em; overflow-wrap: anywhere; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: var(--card); padding: .4rem .8rem; }
.over { color: var(--soft); margin: 0 0 .25rem; font-size: .9rem; }
.lede { font-size: 1.12rem; max-width: 50rem; margin: .25rem 0 1rem; }
nav {
  display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; border-block: 1px solid var(--line); padding: .55rem 0;
  margin-top: 1rem;
}
nav a { text-decoration: none; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
.missing {
  background: var(--odd-back); border-left: 4px solid var(--odd); padding: .6rem .9rem; margin: 1rem 0;
  border-radius: 0 6px 6px 0;
  overflow-wrap: anywhere; max-width: none;
}
.missing ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem 1.25rem; margin: 1.25rem 0
  0;
}
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .6rem; }
th, td { text-align: left; vertical-align: top; padding: .55rem .8rem .55rem 0; border-top: 1px solid var(--line); }
thead th, thead td { border-top: 0; border-bottom: 2px solid var(--line); font-size: .95rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
th small, td small { display: block; line-height: 1.35; }
.better small, .worse small, td .unit { display: inline; }
.headline {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.25rem .5rem;
}
.headline + .headline { margin-top: 1rem; }
.headline tr.first td data { font-size: 1.45rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.3; }
.headline th:first-child { width: 34%; }
.headline tbody tr:not(.first) th small { display: inline; margin-left: .4rem; }
.headline tbody tr:not(.first) :is(th, td) { padding-block: .3rem; font-size: .95rem; }
.interval { display: block; width: clamp(3rem, 12vw, 8rem); margin: .1rem 0; }
.interval path { fill: none; stroke-linecap: round; }
.interval .track { stroke: var(--line); stroke-width: 1.5; }
.interval .range { stroke: var(--s0); stroke-width: 3.5; opacity: .55; }
.interval circle { fill: var(--s0); }
.better { color: var(--good); font-weight: 600; }
.worse { color: var(--bad); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem; }
.chart { display: flex; flex-direction: column; margin: 0; padding: .8rem .9rem .5rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 .9rem; margin: .1rem 0 .2rem; font-size: .82rem; color: var(--soft);
}
.legend b { color: var(--text); font-variant-numeric: tabular-nums; }
.key { white-space: nowrap; }
.swatch { width: 18px; height: 6px; vertical-align: middle; margin-right: .25rem; }
.plot { display: block; margin-top: auto; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.plot text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); fill: none; }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.line.s1 { stroke-dasharray: 6 4; }
.raw { fill: none; stroke-width: 1; opacity: .45; }
.swatch .line { stroke-width: 4; stroke-linecap: butt; }
.stack .swatch .line { stroke-width: 12; stroke-dasharray: none; }
.s0 { stroke: var(--s0); } .s1 { stroke: var(--s1); } .s2 { stroke: var(--s2); } .s3 { stroke: var(--s3); }
.s4 { stroke: var(--s4); } .s5 { stroke: var(--s5); } .s6 { stroke: var(--s6); } .s7 { stroke: var(--s7); }
.bar, .dot { stroke: none; }
.bar.s0, .dot.s0 { fill: var(--s0); } .bar.s1, .dot.s1 { fill: var(--s1); } .bar.s2, .dot.s2 { fill: var(--s2); }
.bar.s3, .dot.s3 { fill: var(--s3); } .bar.s4, .dot.s4 { fill: var(--s4); } .bar.s5, .dot.s5 { fill: var(--s5); }
.bar.s6, .dot.s6 { fill: var(--s6); } .bar.s7, .dot.s7 { fill: var(--s7); }
.note { color: var(--soft); font-size: .8rem; margin: .5rem 0 .2rem; }
.numbers { margin-top: 1rem; }
.numbers th, .numbers td {
  padding: .25rem .9rem .25rem 0; font-size: .84rem; white-space: nowrap; text-align: right;
}
.share { display: block; height: .55rem; background: var(--s0); border-radius: 3px; min-width: 1px; }
.survivors { max-width: 46rem; }
.survivors td:last-child { width: 40%; vertical-align: middle; }
.survivors .number { text-align: right; white-space: nowrap; }
.filter {
  position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .6rem .9rem; align-items: end;
  background: var(--page);
  border-bottom: 1px solid var(--line); padding: .7rem 0; margin-bottom: .75rem;
}
.filter[hidden] { display: none; }
.filter label { font-size: .82rem; color: var(--soft); display: grid; gap: .15rem; }
.filter label.search { flex: 1 1 14rem; }
input, select, button {
  font: inherit; font-size: .92rem; color: var(--text); background: var(--card); border: 1px solid var(--soft);
  border-radius: 6px; padding: 0 .55rem; height: 2.3rem; min-width: 0;
}
input, select { width: 100%; }
button { cursor: pointer; }
button:hover { background: var(--sunk); }
.found { flex-basis: 100%; margin: 0; font-size: .85rem; color: var(--soft); }
.chooser { display: flex; gap: .9rem; align-items: end; margin: .5rem 0 1rem; }
.chooser[hidden] { display: none; }
.chooser label { font-size: .82rem; color: var(--soft); display: grid; gap: .15rem; min-width: 9rem; }
.steps-kept, nav.pages { max-height: 22rem; overflow: auto; }
nav.pages { margin: .5rem 0 1rem; }
.sampled { margin-top: 1.25rem; }
.sampled h4 { margin-bottom: .4rem; }
.sampled .steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 0 1.25rem; }
.why { font-size: .86rem; }
.why > summary { color: var(--soft); }
.between { margin: .75rem 0; }
details > summary { cursor: pointer; }
.block { background: var(--card); border: 1px solid var(--line); border-radius: 8px; margin-bottom: .5rem; }
.block[hidden] { display: none; }
.block > summary {
  display: flex; gap: .35rem 1rem; justify-content: space-between; padding: .55rem .9rem; list-style: none;
}
.block > summary::-webkit-details-marker { display: none; }
.block > summary:hover { background: var(--sunk); border-radius: 8px; }
.block > summary .q::before { content: "▸"; color: var(--soft); display: inline-block; width: 1.1em; }
.block[open] > summary .q::before { content: "▾"; }
.q { min-width: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; unicode-bidi: isolate; }
.chips { display: flex; flex: none; gap: .4rem; }
.chip {
  border-radius: 99px; padding: .1rem .6rem; font-size: .78rem; line-height: 1.5; white-space: nowrap; background:
  var(--sunk); color: var(--soft);
}
.chip.right { background: var(--good-back); color: var(--good); }
.chip.wrong { background: var(--bad-back); color: var(--bad); }
.body { padding: .25rem .9rem 1rem; border-top: 1px solid var(--line); }
.label { color: var(--soft); font-size: .78rem; margin: .55rem 0 .1rem; }
.text {
  font-size: .84rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  tab-size: 4;
}
.question, .gold { font-family: inherit; font-size: .95rem; max-width: 60rem; }
.gold { font-weight: 600; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1.25rem; margin-top:
  1rem;
}
.trajectory { min-width: 0; }
.id { font-weight: 400; color: var(--soft); font-size: .78rem; overflow-wrap: anywhere; }
.outcome { font-size: .88rem; margin: .1rem 0 .5rem; }
.steps { list-style: none; margin: 0; padding: 0; }
.step { border-left: 3px solid var(--line); padding: .1rem 0 .35rem .8rem; margin-bottom: .6rem; }
.step.good { border-color: var(--good); }
.step.bad { border-color: var(--bad); }
.step.unknown { border-color: var(--odd); }
.step .head {
  margin: 0 0 .25rem; font-size: .88rem; display: flex; align-items: center; gap: .45rem; color: var(--soft);
}
.step .head b { color: var(--text); }
.badge {
  border-radius: 4px; padding: .05rem .45rem; font-size: .74rem; font-weight: 700; letter-spacing: .03em;
  margin-left: auto; background: var(--sunk); color: var(--soft);
}
.badge.good { background: var(--good-back); color: var(--good); }
.badge.bad { background: var(--bad-back); color: var(--bad); }
.badge.unknown { background: var(--odd-back); color: var(--odd); }
.action { background: var(--sunk); border-radius: 6px; padding: .5rem .7rem; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: .05em .1em; }
.observation { border: 1px dashed var(--line); border-radius: 6px; padding: .4rem .7rem; }
.reason {
  font-size: .86rem; margin: .35rem 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
}
.reason .label { margin-right: .3rem; }
.cut { color: var(--odd); background: var(--odd-back); border-radius: 4px; padding: 0 .35rem; }
.file {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .55rem .9rem; margin-bottom:
  .5rem;
}
.config {
  font-size: .82rem; line-height: 1.5; white-space: pre-wrap; overflow-wrap: anywhere; margin: .6rem 0 0; tab-size:
  4;
}
footer {
  color: var(--soft); font-size: .85rem; border-top: 1px solid var(--line); margin-top: 3rem; padding-block: 1rem
  2rem;
}
@media (max-width: 46rem) {
  header, main, footer { padding-inline: 1rem; }
  header { padding-top: 1.25rem; }
  h1 { font-size: 1.55rem; }
  .headline { padding: .75rem .8rem .25rem; }
  th, td { padding-right: .5rem; }
  .headline th:first-child { width: 25%; }
  .headline td { font-size: .82rem; }
  .headline :is(th, td) { padding-right: .3rem; }
  .headline thead th { font-size: .7rem; }
  .headline tbody tr th, .headline tbody tr:not(.first) th { font-size: .84rem; overflow-wrap: break-word; }
  .headline td small { font-size: .74rem; }
  .headline td .unit { display: none; }
  .headline tbody tr th small, .headline tbody tr:not(.first) th small { display: none; }
  .headline tr.first td data { font-size: 1.15rem; }
  .filter { position: static; }
  .filter label { flex: 1 1 8.5rem; }
  .block > summary { flex-direction: column; }
  .q { white-space: normal; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; }
  .chips { flex-wrap: wrap; }
}
@media print { .filter, nav, .skip { display: none; } .block, .chart, .headline { break-inside: avoid; } }
"""

# All of the page can be read without it: it shows values under the pointer in the legends, and filters trajectories.
JS = """
"use strict";
for (const figure of document.querySelectorAll("figure[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor");
  const at = figure.querySelector(".at"), shown = figure.querySelectorAll(".legend b"), end = data.x.length - 1;
  let now = data.last;
  const show = (i, marked) => {
    now = i;
    at.textContent = data.at[i];
    shown.forEach((element, k) => { element.textContent = data.values[k][i]; });
    cursor.setAttribute("transform", `translate(${data.x[i]} 0)`);
    cursor.setAttribute("visibility", marked ? "visible" : "hidden");
  };
  const point = event => {
    const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * plot.viewBox.baseVal.width;
    let best = 0;
    data.x.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(data.x[best] - x)) best = i; });
    show(best, true);
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", () => show(data.last, false));
  plot.addEventListener("blur", () => show(data.last, false));
  plot.addEventListener("keydown", event => {
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: end }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), end), true);
  });
}
const chooser = document.querySelector(".chooser");
if (chooser) {
  chooser.hidden = false;
  chooser.addEventListener("submit", event => {
    event.preventDefault();
    location.href = new FormData(chooser).get("page");
  });
}
const form = document.querySelector(".filter");
if (form) {
  form.hidden = false;
  const blocks = [...document.querySelectorAll(".block")].map(element => ({
    element, change: element.dataset.change, question: element.querySelector(".question").textContent.toLowerCase(),
    articles: [...element.querySelectorAll(".trajectory")].map(one => ({
      data: one.dataset, verdicts: one.dataset.verdicts.split(" "), text: one.textContent.toLowerCase(),
    })),
  }));
  const apply = () => {
    const { verdict, finish, match, search } = Object.fromEntries(new FormData(form));
    const words = search.toLowerCase().trim();
    let seen = 0;
    for (const { element, change, question, articles } of blocks) {
      const anyChange = match !== "gained" && match !== "lost";
      const fits = (anyChange || change === match) && articles.some(({ data, verdicts, text }) =>
        (!verdict || (verdict === "ALL" ? verdicts.join() === "GOOD" : verdicts.includes(verdict)))
        && (!match || !anyChange || data.match === match) && (!finish || data.finish === finish)
        && (!words || question.includes(words) || text.includes(words)));
      element.hidden = !fits;
      seen += fits;
    }
    form.querySelector(".found").textContent = `${seen} of ${blocks.length} questions shown`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", event => event.preventDefault());
  form.querySelector("[data-open]").addEventListener("click", () => {
    const shown = blocks.filter(block => !block.element.hidden).map(block => block.element);
    const open = shown.some(element => !element.open);
    shown.forEach(element => { element.open = open; });
  });
  apply();
}
"""
