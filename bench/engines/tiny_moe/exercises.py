"""Generated mathematics exercises with worked solutions (our own text; deterministic for a seed)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random


def _polynomial(coefficients: list[int]) -> str:
    """``[a0, a1, ...]`` as text, highest power first."""
    terms = []
    for power in range(len(coefficients) - 1, -1, -1):
        c = coefficients[power]
        if c:
            factor = "" if abs(c) == 1 and power else str(abs(c))
            terms.append(("-" if c < 0 else "+", factor + ("" if power == 0 else "x" if power == 1 else f"x^{power}")))
    if not terms:
        return "0"
    first = ("-" if terms[0][0] == "-" else "") + terms[0][1]
    return " ".join([first] + [f"{sign} {term}" for sign, term in terms[1:]])


def _addition(r: Random) -> str:
    a, b = r.randint(10, 9999), r.randint(10, 9999)
    lines, carry, place, x, y = [], 0, 1, a, b
    while x or y or carry:
        total = x % 10 + y % 10 + carry
        lines.append(f"place {place}: {x % 10} + {y % 10} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry, x, y, place = total // 10, x // 10, y // 10, place * 10
    return f"Compute {a} + {b}.\n" + "\n".join(lines) + f"\nAnswer: {a + b}"


def _multiplication(r: Random) -> str:
    a, b = r.randint(12, 999), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return f"Compute {a} * {b}.\n{a} * {b} = {a} * {tens} + {a} * {ones}\n= {a * tens} + {a * ones}\nAnswer: {a * b}"


def _linear(r: Random) -> str:
    a, b, x = r.randint(2, 12), r.randint(-30, 30), r.randint(-15, 15)
    c = a * x + b
    left = _polynomial([b, a])
    return (
        f"Solve {left} = {c} for x.\nSubtract {b} from both sides: {a}x = {c - b}\nDivide by {a}: x = {x}\n"
        f"Check: {a} * {x} + {b} = {c}\nAnswer: x = {x}"
    )


def _quadratic(r: Random) -> str:
    p, q = r.randint(-9, 9), r.randint(-9, 9)
    poly = _polynomial([p * q, -(p + q), 1])
    roots = f"x = {p}" if p == q else f"x = {min(p, q)} or x = {max(p, q)}"
    disc = (p - q) ** 2
    return (
        f"Solve {poly} = 0.\nThe sum of the roots is {p + q} and their product is {p * q}.\n"
        f"Discriminant: {(p + q) ** 2} - {4 * p * q} = {disc} = {abs(p - q)}^2\nAnswer: {roots}"
    )


def _derivative(r: Random) -> str:
    c = [r.randint(-9, 9) for _ in range(r.randint(3, 5))] + [r.randint(1, 9)]
    d = [k * c[k] for k in range(1, len(c))]
    at = r.randint(-2, 3)
    value = sum(k * at**i for i, k in enumerate(d))
    return (
        f"Let f(x) = {_polynomial(c)}. Find f'(x) and f'({at}).\nBy the power rule, f'(x) = {_polynomial(d)}.\n"
        f"Answer: f'({at}) = {value}"
    )


def _integral(r: Random) -> str:
    c = [(k + 1) * r.randint(-5, 5) for k in range(r.randint(2, 4))]
    whole = [0] + [c[k] // (k + 1) for k in range(len(c))]
    low, high = r.randint(-2, 1), r.randint(2, 4)

    def value(x: int) -> int:
        return sum(k * x**i for i, k in enumerate(whole))

    return (
        f"Evaluate \\int_{{{low}}}^{{{high}}} ({_polynomial(c)}) \\, dx.\n"
        f"An antiderivative is F(x) = {_polynomial(whole)}.\n"
        f"F({high}) - F({low}) = {value(high)} - ({value(low)})\nAnswer: {value(high) - value(low)}"
    )


def _gcd(r: Random) -> str:
    a, b = r.randint(50, 3000), r.randint(20, 900)
    lines, x, y = [], max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return (
        f"Find the greatest common divisor of {a} and {b} with the Euclidean algorithm.\n"
        + "\n".join(lines)
        + f"\nAnswer: gcd({a}, {b}) = {math.gcd(a, b)}"
    )


def _fractions(r: Random) -> str:
    x, y = Fraction(r.randint(1, 11), r.randint(2, 12)), Fraction(r.randint(1, 11), r.randint(2, 12))
    common = math.lcm(x.denominator, y.denominator)
    sx, sy = x.numerator * common // x.denominator, y.numerator * common // y.denominator
    return (
        f"Compute \\frac{{{x.numerator}}}{{{x.denominator}}} + \\frac{{{y.numerator}}}{{{y.denominator}}}.\n"
        f"The common denominator is {common}: {sx}/{common} + {sy}/{common} = {sx + sy}/{common}\nAnswer: {x + y}"
    )


def _modular(r: Random) -> str:
    base, exponent, modulus = r.randint(2, 12), r.randint(3, 9), r.randint(5, 29)
    lines, value = [], 1
    for step in range(1, exponent + 1):
        lines.append(f"{base}^{step} = {value} * {base} = {value * base} = {value * base % modulus} (mod {modulus})")
        value = value * base % modulus
    return f"Compute {base}^{exponent} modulo {modulus}.\n" + "\n".join(lines) + f"\nAnswer: {value}"


def _sequence(r: Random) -> str:
    start, step, n = r.randint(-20, 40), r.randint(2, 15), r.randint(6, 30)
    shown = ", ".join(str(start + step * i) for i in range(4))
    last = start + step * (n - 1)
    return (
        f"An arithmetic sequence begins {shown}. Find term {n} and the sum of the first {n} terms.\n"
        f"a_{n} = {start} + {n - 1} * {step} = {last}\n"
        f"S_{n} = {n} * ({start} + {last}) / 2 = {n * (start + last) // 2}\n"
        f"Answer: a_{n} = {last}, S_{n} = {n * (start + last) // 2}"
    )


def _matrix(r: Random) -> str:
    a, b, c, d = (r.randint(-9, 9) for _ in range(4))
    return (
        f"Find the determinant of the matrix [[{a}, {b}], [{c}, {d}]].\n"
        f"det = {a} * {d} - {b} * {c} = {a * d} - {b * c}\n"
        f"Answer: {a * d - b * c}"
    )


def _percent(r: Random) -> str:
    price, percent = r.randint(2, 60) * 20, r.choice((5, 10, 15, 20, 25, 30, 40, 45, 60, 75))
    off = price * percent // 100
    return (
        f"A price of {price} is reduced by {percent} percent. What is the new price?\n"
        f"The reduction is {price} * {percent} / 100 = {off}.\nAnswer: {price} - {off} = {price - off}"
    )


KINDS: tuple[Callable[[Random], str], ...] = (
    _addition,
    _multiplication,
    _linear,
    _quadratic,
    _derivative,
    _integral,
    _gcd,
    _fractions,
    _modular,
    _sequence,
    _matrix,
    _percent,
)


def documents(count: int, seed: int = 0) -> Iterator[str]:
    """``count`` sheets of 40 exercises; a sheet keeps to three kinds, as a textbook chapter does."""
    r = Random(seed)
    for _ in range(count):
        kinds = r.sample(KINDS, 3)
        yield "\n\n".join(f"Exercise {i}. {r.choice(kinds)(r)}" for i in range(1, 41))
