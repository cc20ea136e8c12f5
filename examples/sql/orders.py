"""Questions about a table of orders: an SQL tool, a task and a reward. `python orders.py` makes the table."""

import random
import sqlite3
from contextlib import closing
from itertools import product
from pathlib import Path

DATABASE = Path(__file__).parent / "data" / "orders.db"
NAMES = "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karl Lena".split()
ITEMS = "apples books chairs cups lamps pens plates".split()
ASKED = {"How many {item} did {name} buy?": "number", "How much did {name} pay for {item}?": "price"}
QUERIES = {
    text.format(name=name, item=item): f"SELECT sum({column}) FROM orders WHERE name = '{name}' AND item = '{item}'"
    for (text, column), name, item in product(ASKED.items(), NAMES, ITEMS)
}


def sql(query: str) -> str:
    """Looks up orders in an SQLite table, orders (name, item, number, price), and gives back the rows.

    Args:
        query: one SELECT
    """
    file = DATABASE.resolve(strict=True).as_uri()
    with closing(sqlite3.connect(f"{file}?mode=ro", uri=True)) as table:  # one a call: there are threads
        table.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # of other files
        table.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        table.set_progress_handler(lambda: True, 1_000_000)  # ends a query that would not end
        try:
            return "; ".join(", ".join(map(str, row)) for row in table.execute(query).fetchmany(5)) or "no rows"
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            return f"ERROR: {error}"


class Orders:
    name = "orders"

    def questions(self, split):
        for text, query in random.Random(split).sample(sorted(QUERIES.items()), len(QUERIES)):
            if (" Karl " in text or " Lena " in text) == (split == "eval"):
                yield {"question": text, "answer": sql(query)}


def reward(step):
    """The value that was asked for must be looked up, once, and then be the answer."""
    value, argument = sql(QUERIES[step.question]), step.action.argument
    found = any(observation.endswith(f" -> {value}") for _, observation in step.history)
    if step.action.kind == "answer":
        return found and argument == value
    return 0.0 if found or sql(argument).startswith("ERROR") else 1.0 if sql(argument) == value else 0.25


if __name__ == "__main__":
    DATABASE.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(DATABASE)) as table, table:
        table.executescript("DROP TABLE IF EXISTS orders; CREATE TABLE orders (name, item, number, price)")
        draw, insert = random.Random(0).randint, "INSERT INTO orders VALUES (?, ?, ?, ?)"
        for name, item, _ in product(["Olga", *NAMES], ITEMS, range(3)):
            table.execute(insert, (name, item, draw(1, 9), draw(10, 99)))
