"""Word problems with worked answers, generated from a seed: the demo's mathematics."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_NAMES = (
    *("Aino", "Ben", "Chidi", "Dara", "Emil", "Farah", "Goran", "Hana", "Ivo", "Jun", "Kofi", "Lena"),
    *("Mateo", "Noor", "Olga", "Pavel", "Quinn", "Rosa", "Sami", "Tess", "Uma", "Viktor", "Wen", "Ximena"),
    *("Yusuf", "Zora"),
)
_THINGS = (
    *("apples", "pencils", "marbles", "stickers", "buttons", "shells", "stamps", "candles", "cookies"),
    *("bottles", "tickets", "ribbons", "seeds", "tiles", "postcards", "lemons", "bricks", "coins"),
)
_PLACES = (
    *("market", "library", "harbour", "school", "museum"),
    *("bakery", "farm", "workshop", "station", "theatre"),
)


def word_problems(seed: int) -> Iterator[str]:
    """An endless, reproducible stream of problems, one paragraph each: a question, its steps, its answer."""
    rng = random.Random(seed)
    while True:
        question, steps, answer = rng.choice(_KINDS)(rng)
        yield f"Question: {question}\nAnswer: {' '.join(steps)} The answer is {answer}."


Problem = tuple[str, list[str], int]


def _story(rng: random.Random) -> Problem:
    """An amount that two to four events change."""
    name, friend = rng.sample(_NAMES, 2)
    things, amount = rng.choice(_THINGS), rng.randint(12, 90)
    told = [rng.choice([f"{name} has {amount} {things}.", f"In the morning {name} counts {amount} {things}."])]
    steps = []
    for _ in range(rng.randint(2, 4)):
        event = rng.choice(["gain", "lose", "boxes", "double", "halve"])
        number, before = rng.randint(2, 30), amount
        if event == "lose" and number < amount:
            amount -= number
            told.append(rng.choice([f"{friend} borrows {number} of them.", f"Then {number} {things} go to {friend}."]))
            steps.append(f"After giving some away {name} keeps {before} - {number} = {amount} {things}.")
        elif event == "boxes":
            boxes, each = rng.randint(2, 6), rng.randint(3, 12)
            amount += boxes * each
            told.append(f"{name} buys {boxes} boxes with {each} {things} in each.")
            steps.append(
                f"The boxes hold {boxes} * {each} = {boxes * each} {things}, "
                f"which makes {before} + {boxes * each} = {amount}."
            )
        elif event == "double" and amount < 150:
            amount *= 2
            told.append(f"A prize doubles what {name} has.")
            steps.append(f"Doubled, that is {before} * 2 = {amount}.")
        elif event == "halve" and amount % 2 == 0:
            amount //= 2
            told.append(f"Half of the {things} are left at the {rng.choice(_PLACES)}.")
            steps.append(f"Half of {before} is {before} / 2 = {amount}.")
        else:
            amount += number
            told.append(
                rng.choice([f"{friend} brings {number} more.", f"At the {rng.choice(_PLACES)} {number} more turn up."])
            )
            steps.append(f"With {number} more there are {before} + {number} = {amount} {things}.")
    told.append(rng.choice([f"How many {things} does {name} have now?", f"How many {things} are there at the end?"]))
    return " ".join(told), steps, amount


def _shopping(rng: random.Random) -> Problem:
    """Several prices and counts, then the change from a note."""
    name = rng.choice(_NAMES)
    goods = rng.sample(_THINGS, rng.randint(2, 3))
    counts, prices = [rng.randint(2, 9) for _ in goods], [rng.randint(2, 15) for _ in goods]
    costs = [count * price for count, price in zip(counts, prices, strict=True)]
    total = sum(costs)
    note = (total // 50 + 1) * 50
    listed = [
        f"{count} {thing} at {price} euros each" for count, thing, price in zip(counts, goods, prices, strict=True)
    ]
    steps = [
        f"The {thing} cost {count} * {price} = {cost} euros."
        for thing, count, price, cost in zip(goods, counts, prices, costs, strict=True)
    ]
    steps.append(f"Together that is {' + '.join(map(str, costs))} = {total} euros.")
    told = f"At the {rng.choice(_PLACES)} {name} buys {', '.join(listed[:-1])} and {listed[-1]}"
    if rng.random() < 0.5:
        return f"{told}. What does everything cost?", steps, total
    steps.append(f"The change is {note} - {total} = {note - total} euros.")
    return f"{told}, and pays with {note} euros. How much change comes back?", steps, note - total


def _journey(rng: random.Random) -> Problem:
    """Two legs at constant speed, perhaps compared with a longer route."""
    name, vehicle = rng.choice(_NAMES), rng.choice(["bus", "train", "boat", "bicycle", "truck"])
    speeds, hours = [rng.randint(8, 90) for _ in range(2)], [rng.randint(2, 6) for _ in range(2)]
    legs = [speed * hour for speed, hour in zip(speeds, hours, strict=True)]
    total = sum(legs)
    question = (
        f"{name} rides a {vehicle} for {hours[0]} hours at {speeds[0]} kilometres an hour and then for {hours[1]} "
        f"hours at {speeds[1]} kilometres an hour."
    )
    steps = [
        f"The first leg is {hours[0]} * {speeds[0]} = {legs[0]} kilometres and the second is {hours[1]} * {speeds[1]} "
        f"= {legs[1]} kilometres.",
        f"That makes {legs[0]} + {legs[1]} = {total} kilometres.",
    ]
    if rng.random() < 0.5:
        return f"{question} How far is the whole way?", steps, total
    route = total + rng.randint(10, 200)
    steps.append(f"Still to go: {route} - {total} = {route - total} kilometres.")
    return (
        f"{question} The {rng.choice(_PLACES)} lies {route} kilometres away. How many kilometres are left?",
        steps,
        route - total,
    )


def _sharing(rng: random.Random) -> Problem:
    """Packs put together, some spoilt, the rest shared out equally."""
    things, people = rng.choice(_THINGS), rng.randint(3, 9)
    share, spoilt, packs = rng.randint(4, 25), rng.randint(1, 12), rng.randint(2, 8)
    in_packs = people * share + spoilt
    each, loose = divmod(in_packs, packs)
    steps = [f"The packs hold {packs} * {each} = {packs * each} {things}."]
    if loose:
        steps.append(f"With the loose ones there are {packs * each} + {loose} = {in_packs}.")
    steps.append(f"Without the spoilt ones {in_packs} - {spoilt} = {in_packs - spoilt} remain.")
    steps.append(f"Each of {people} people gets {in_packs - spoilt} / {people} = {share} {things}.")
    extra = f" and {loose} loose {things}" if loose else ""
    question = (
        f"The {rng.choice(_PLACES)} receives {packs} packs of {each} {things}{extra}. {spoilt} are spoilt, and the "
        f"rest is shared equally by {people} people. How many does each person get?"
    )
    return question, steps, share


def _wages(rng: random.Random) -> Problem:
    """An hourly wage over some weeks, less what is spent."""
    name, wage, hours, weeks = rng.choice(_NAMES), rng.randint(9, 30), rng.randint(4, 38), rng.randint(2, 6)
    weekly = wage * hours
    earned = weekly * weeks
    spent = rng.randint(5, earned // 2)
    goal = rng.choice(["a tent", "a guitar", "a used bicycle", "new tools", "a coat"])
    question = (
        f"{name} works {hours} hours a week at the {rng.choice(_PLACES)} for {wage} euros an hour. After {weeks} weeks "
        f"{name} buys {goal} for {spent} euros. How many euros are left?"
    )
    steps = [
        f"One week pays {hours} * {wage} = {weekly} euros.",
        f"{weeks} weeks pay {weeks} * {weekly} = {earned} euros.",
        f"After the purchase {earned} - {spent} = {earned - spent} euros are left.",
    ]
    return question, steps, earned - spent


def _garden(rng: random.Random) -> Problem:
    """A rectangle: its fence, or how many plants its area holds."""
    name, width, length = rng.choice(_NAMES), rng.randint(3, 30), rng.randint(3, 40)
    plot = rng.choice(["garden", "field", "courtyard", "meadow"])
    question = f"{name} has a {plot} that is {width} metres wide and {length} metres long."
    if rng.random() < 0.5:
        around, price = 2 * (width + length), rng.randint(2, 12)
        steps = [
            f"Width and length together are {width} + {length} = {width + length} metres.",
            f"The way around is 2 * {width + length} = {around} metres.",
            f"The fence costs {around} * {price} = {around * price} euros.",
        ]
        return (
            f"{question} A fence costs {price} euros a metre. What does a fence all around cost?",
            steps,
            around * price,
        )
    area, per_metre = width * length, rng.randint(2, 9)
    steps = [
        f"The area is {width} * {length} = {area} square metres.",
        f"It takes {area} * {per_metre} = {area * per_metre} plants.",
    ]
    return f"{question} Each square metre takes {per_metre} plants. How many plants fit?", steps, area * per_metre


def _ages(rng: random.Random) -> Problem:
    """Two people's ages, some years on."""
    older, younger = rng.sample(_NAMES, 2)
    age, factor, years = rng.randint(3, 19), rng.randint(2, 4), rng.randint(2, 15)
    difference = rng.randint(1, 6)
    other = age * factor + difference
    steps = [
        f"{factor} times {age} is {factor} * {age} = {age * factor}, and {difference} more makes "
        f"{age * factor} + {difference} = {other}.",
        f"In {years} years {younger} is {age} + {years} = {age + years}, "
        f"and {older} is {other} + {years} = {other + years}.",
        f"The sum is {age + years} + {other + years} = {age + other + 2 * years}.",
    ]
    question = (
        f"{younger} is {age} years old. {older} is {difference} years older than {factor} times that. "
        f"What is the sum of their ages in {years} years?"
    )
    return question, steps, age + other + 2 * years


def _machine(rng: random.Random) -> Problem:
    """Two rates that work at the same time, less what fails a check."""
    things = rng.choice(_THINGS)
    rates, minutes = [rng.randint(3, 40) for _ in range(2)], rng.randint(4, 45)
    rate = sum(rates)
    made = rate * minutes
    failed = rng.randint(1, max(1, made // 4))
    question = (
        f"In a {rng.choice(_PLACES)} one machine packs {rates[0]} {things} a minute and another packs {rates[1]}. Both "
        f"run for {minutes} minutes, and {failed} {things} fail the check. How many pass?"
    )
    steps = [
        f"Together they pack {rates[0]} + {rates[1]} = {rate} {things} a minute.",
        f"In {minutes} minutes that is {rate} * {minutes} = {made}.",
        f"{made} - {failed} = {made - failed} pass.",
    ]
    return question, steps, made - failed


_KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _story,
    _story,
    _shopping,
    _journey,
    _sharing,
    _wages,
    _garden,
    _ages,
    _machine,
)
