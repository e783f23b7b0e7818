"""Emits the vector kernels: some tokens times some rows of a panel, over all of K.

A kernel keeps one accumulator a token and vector of rows, in scalar variables: arrays of vectors
end up on the stack. Per group of K it multiplies codes as they are stored, and accounts for the
groups' metadata once, at the group's end:

    asym        f += s · float(Σ x·q − z·Σ x)             z·Σ x is where the accumulator starts
    two-level   F += t · Σ x·q + c · Σ x − 128 · Σ x      in integers, with one scale a token
                f += s_x · float(the same of one group)   with one scale a group

Two-level rows with one scale a token are therefore exact, and cost no expansion of codes. Their
offsets c take one dot product for two groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from .isa import Isa
from .lanes import LANES, STEP, WORD, Field

FLUSH = {2: 8, 3: 8, 4: 8, 5: 4, 6: 2}
"""Without VNNI: how many sums of two products fit int16, as a number of steps; 2·qmax·127 each."""


def steps_of_turn(isa: Isa, bits: int) -> int:
    """Steps that one turn of a kernel's loop takes: whole units, so that groups are whole turns."""
    return max(LANES[bits].steps, 4 if isa.vnni else 8)


@dataclass(frozen=True)
class Scheme:
    """What a source is generated for: a family of formats and a granularity of activations."""

    family: str
    mode: str

    @property
    def integer(self) -> bool:
        """Whether sums over K stay in integers."""
        return self.family == "two-level" and self.mode == "token"


@dataclass(frozen=True)
class Kernel:
    """One kernel: `tokens` times a panel's rows, in passes of `vectors` of them at a time.

    Every group of K is read once from wherever it lies, and by later passes from the first cache.
    """

    isa: Isa
    scheme: Scheme
    bits: int
    tokens: int

    @property
    def name(self) -> str:
        return f"w{self.bits}_t{self.tokens}"

    @property
    def vectors(self) -> int:
        """Vectors of rows of a pass: all that registers hold accumulators for."""
        count = 64 // self.isa.rows
        while count > 1 and not self._fits(count):
            count //= 2
        return count

    def _fits(self, count: int) -> bool:
        codes = count if self.tokens > 1 else 1
        return self.tokens * count + codes + (2 if self.isa.vnni else 3) <= self.isa.registers

    @property
    def _passes(self) -> list[range]:
        return [range(r, r + self.vectors) for r in range(0, 64 // self.isa.rows, self.vectors)]

    def _cells(self, rows: range) -> list[tuple[int, int]]:
        return [(t, r) for t in range(self.tokens) for r in rows]

    @property
    def _flat(self) -> bool:
        """Whether one integer accumulator serves all of K."""
        return self.scheme.integer and self.bits == 8

    @property
    def _sets(self) -> str:
        """Names of accumulators: a second set where few of them would wait for each other."""
        return "ab" if self.isa.vnni and self.tokens * self.vectors < 8 else "a"

    @property
    def _kept(self) -> bool:
        """Without VNNI, whether sums of a group stay in registers beside those of a few steps."""
        used = 2 * self.tokens * self.vectors + self.vectors + 3
        return self.isa.vnni or self._signed or used <= self.isa.registers

    @property
    def _live(self) -> bool:
        """Whether the results of the groups so far stay in registers too."""
        used = self.tokens * self.vectors * (1 + len(self._sets)) + self.vectors + 4
        one = len(self._passes) == 1
        return one and self._kept and (self._flat or used <= self.isa.registers)

    @property
    def _signed(self) -> bool:
        """Whether products of 8-bit codes need no correction by 128."""
        return self.bits == 8 and not self.isa.vnni

    def _at(self, t: int, r: int) -> str:
        return f"out + {t * 64 + r * self.isa.rows}"

    def source(self) -> str:
        """The C++ function."""
        lines = [
            f"static void {self.name}(const uint8_t* w, const Tile& tile, long groups, long steps,"
            " float* out) {",
            "  const int8_t* x = tile.codes;",
        ]
        if not self._kept:
            lines += [f"  alignas(64) int32_t sums[{self.tokens * 64}];"]
        if self.tokens > 1:
            lines += ["  Next next = tile.next;"]
        lines += self._start()
        lines += ["  for (long g = 0; g < groups; g++) {", "    const uint8_t* meta = w;"]
        if self._meta_bytes:
            ahead = f" next.at += {self._meta_bytes};" if self.tokens > 1 else ""
            lines += [f"    w += {self._meta_bytes};{ahead}"]
        if len(self._passes) > 1:
            lines += ["    const uint8_t* const codes = w;", "    const int8_t* const group = x;"]
        for rows in self._passes:
            lines += ["    {", *(["    w = codes; x = group;"] if rows.start else [])]
            lines += [*self._start_group(rows), *self._loop(rows), *self._end_group(rows), "    }"]
            if not self._live:
                # Or gcc forwards `out` from one group to the next through stack slots.
                lines += ["    FENCE;"]
        lines += ["  }"]
        if self._live:
            put = "store" if self.scheme.integer else "store_floats"
            for t, r in self._cells(self._passes[0]):
                lines += [f"  {put}({self._at(t, r)}, {self._result(t, r)});"]
        return "\n".join([*lines, "}"])

    def _result(self, t: int, r: int) -> str:
        return self._total(t, r) if self._flat else f"f{t}_{r}"

    def _loop(self, rows: range) -> list[str]:
        """Over the codes of a group."""
        chunk = steps_of_turn(self.isa, self.bits)
        turns = f"    for (long i = 0; i < steps / {chunk}; i++) {{"
        return [turns, *self._chunk(rows), *([] if self._kept else ["      FENCE;"]), "    }"]

    @property
    def _meta_bytes(self) -> int:
        if self.scheme.family == "two-level":
            return 0 if self.bits == 8 else 64
        return 128 if self.bits == 8 else 192

    @property
    def _unroll(self) -> int:
        """Units of one turn of the loop."""
        return steps_of_turn(self.isa, self.bits) // LANES[self.bits].steps

    def _start(self) -> list[str]:
        """Accumulators of all of K, and where rows of a panel begin."""
        every = range(64 // self.isa.rows)
        two_level = self.scheme.family == "two-level"
        lines = ["  w += 256;"] if two_level else []
        if self.scheme.integer and self.bits == 8:
            for t, r in self._cells(every):
                start = "zero()" if self._signed else f"broadcast(tile.minus128 + {t})"
                if self._live:
                    lines += [f"  Ints {n}{t}_{r} = zero();" for n in self._sets[1:]]
                    lines += [f"  Ints a{t}_{r} = {start};"]
                else:
                    lines += [f"  store({self._at(t, r)}, {start});"]
            return lines
        if self.scheme.integer:
            for rows in self._passes:
                lines += self._offsets(rows)
            return [*lines, "  w += (groups + 1) / 2 * 128;"]
        if two_level and self.bits != 8:
            lines += ["  const uint8_t* offsets = w;", "  w += (groups + 1) / 2 * 128;"]
        for t, r in self._cells(every):
            if self._live:
                lines += [f"  Floats f{t}_{r} = zero_floats();"]
            else:
                lines += [f"  store_floats({self._at(t, r)}, zero_floats());"]
        return lines

    def _offsets(self, rows: range) -> list[str]:
        """Of two-level rows, what their offsets c and the shift by 128 give: exact integers."""
        cells, width = self._cells(rows), self.isa.rows
        lines = [f"  Ints f{t}_{r} = broadcast(tile.minus128 + {t});" for t, r in cells]
        lines += ["  for (long h = 0; h < (groups + 1) / 2; h++) {"]
        for r in rows:
            lines += [f"    const Ints c{r} = bytes_to_halves(w + h * 128 + {2 * width * r});"]
        for t in range(self.tokens):
            halves = f"broadcast(tile.halves + h * {self.tokens} + {t})"
            lines += [f"    {{ const Ints s = {halves};"]
            lines += [f"      dot_halves(f{t}_{r}, c{r}, s);" for r in rows]
            lines += ["    }"]
        lines += ["  }"]
        if self._live:
            return lines
        stores = [f"  store({self._at(t, r)}, f{t}_{r});" for t, r in cells]
        return ["  {", *lines, *stores, "  }"]

    def _start_group(self, rows: range) -> list[str]:
        """What the accumulators of a group start with."""
        width, lines = self.isa.rows, []
        asym = self.scheme.family == "asym"
        if self._flat:
            if not self._live:
                lines += [
                    f"    Ints a{t}_{r} = load({self._at(t, r)});" for t, r in self._cells(rows)
                ]
                for n in self._sets[1:]:
                    lines += [f"    Ints {n}{t}_{r} = zero();" for t, r in self._cells(rows)]
            return lines
        for t, r in self._cells(rows):
            index = f"g * {self.tokens} + {t}"
            start = "zero()"
            if self.bits == 8 and not self._signed:
                start = f"broadcast(tile.minus128 + {index})"
            elif asym and self.bits <= 4 and self.isa.looks_up:
                z = f"bytes_to_ints(meta + {128 + r * width})"
                start = f"look_up({z}, tile.table + ({index}) * 16)"
            part = [f"    Ints a{t}_{r} = {start};"]
            if asym and self.bits < 8 and not (self.bits <= 4 and self.isa.looks_up):
                z = f"bytes_to_ints(meta + {128 + r * width})"
                part += [f"    dot_halves(a{t}_{r}, {z}, broadcast(tile.halves + {index}));"]
            if not self._kept:
                part = ["    {", *part, f"    store({self._sum(t, r)}, a{t}_{r});", "    }"]
            lines += [*part, *(f"    Ints {n}{t}_{r} = zero();" for n in self._sets[1:])]
        return lines

    def _sum(self, t: int, r: int) -> str:
        return f"sums + {t * 64 + r * self.isa.rows}"

    def _chunk(self, rows: range) -> list[str]:
        """The products of one turn of the loop over a group."""
        lanes = LANES[self.bits]
        lines: list[str] = []
        if rows.start == 0:  # the other vectors of a panel find it in the cache
            count = lanes.unit_bytes * self._unroll // 64
            lines += [f"      prefetch<{count}>(w);" if self.tokens == 1 else "      next.more();"]
        if not self.isa.vnni and not self._signed:
            lines += [f"      Ints d{t}_{r};" for t, r in self._cells(rows)]
        for unit in range(self._unroll):
            for j, fields in enumerate(lanes.fields):
                lines += ["      {", *self._step(rows, unit, j, fields), "      }"]
        codes, activations = lanes.unit_bytes * self._unroll, lanes.steps * self._unroll
        return [*lines, f"      w += {codes}; x += {STEP * self.tokens * activations};"]

    def _step(self, rows: range, unit: int, j: int, fields: tuple[Field, ...]) -> list[str]:
        """The products of 4 neighbouring k."""
        step = unit * LANES[self.bits].steps + j
        code = {r: f"const Ints q{r} = {self._code(fields, unit, r)};" for r in rows}
        y = [
            f"const Ints y = broadcast(x + {STEP * (step * self.tokens + t)});"
            for t in range(self.tokens)
        ]
        lines = []
        if self.tokens == 1 or self._signed:  # few registers: a code at a time
            for r in rows:
                lines += [f"        {{ {code[r]}"]
                for t in range(self.tokens):
                    lines += [f"          {{ {y[t]} {self._product(t, r, step)} }}"]
                lines += ["        }"]
        else:
            lines += [f"        {code[r]}" for r in rows]
            for t in range(self.tokens):
                lines += [f"        {{ {y[t]}"]
                lines += [f"          {self._product(t, r, step)}" for r in rows]
                lines += ["        }"]
        if self.isa.vnni or self._signed or step % FLUSH[self.bits] != FLUSH[self.bits] - 1:
            return lines
        # Sums of int16 go to the accumulators before they can overflow.
        for t, r in self._cells(rows):
            if self._kept:
                lines += [f"        a{t}_{r} = add(a{t}_{r}, pairs(d{t}_{r}));"]
            else:
                place = self._sum(t, r)
                lines += [f"        store({place}, add(load({place}), pairs(d{t}_{r})));"]
        return lines

    def _product(self, t: int, r: int, step: int) -> str:
        if self.isa.vnni:
            return f"dot({self._sets[step % len(self._sets)]}{t}_{r}, q{r}, y);"
        if self._signed:
            return f"dot_signed(a{t}_{r}, q{r}, y);"
        if step % FLUSH[self.bits] == 0:
            return f"d{t}_{r} = products(q{r}, y);"
        return f"add_products(d{t}_{r}, q{r}, y);"

    def _code(self, fields: tuple[Field, ...], unit: int, r: int) -> str:
        """The codes of one step, one a byte."""
        vector = 4 * self.isa.rows
        base = unit * LANES[self.bits].unit_bytes + r * vector
        code, have = "", 0
        for field in fields:
            part = f"load(w + {base + field.word * WORD})"
            shift = field.at - field.to
            if shift:
                part = f"{'right' if shift > 0 else 'left'}<{abs(shift)}>({part})"
            code = f"select<{have}>({code}, {part})" if code else part
            have |= field.mask
        return code if self.bits == 8 else f"keep<{have}>({code})"

    def _end_group(self, rows: range) -> list[str]:
        """Add the products of a group to the results, with its metadata."""
        width, lines = self.isa.rows, []
        asym, groups = self.scheme.family == "asym", self.scheme.mode == "group"
        if self._flat:
            cells = [] if self._live else self._cells(rows)
            return [f"    store({self._at(t, r)}, {self._total(t, r)});" for t, r in cells]
        if groups and not asym and self.bits != 8:
            lines += ["    const uint8_t* pair = offsets + g / 2 * 128;"]
        for r in rows:
            lines += ["    {"]
            if asym:
                lines += [f"      const Floats s = half_floats(meta + {2 * width * r});"]
            elif self.bits != 8:
                lines += [f"      const Ints m = bytes_to_ints(meta + {width * r});"]
                if groups:
                    lines += [f"      const Ints c = bytes_to_halves(pair + {2 * width * r});"]
            for t in range(self.tokens):
                lines += self._end_cell(t, r)
            lines += ["    }"]
        return lines

    def _total(self, t: int, r: int) -> str:
        if not self._kept:
            return f"load({self._sum(t, r)})"
        return f"add(a{t}_{r}, b{t}_{r})" if "b" in self._sets else f"a{t}_{r}"

    def _end_cell(self, t: int, r: int) -> list[str]:
        asym, groups = self.scheme.family == "asym", self.scheme.mode == "group"
        index = f"g * {self.tokens} + {t}"
        total = self._total(t, r)
        if self.scheme.integer:
            before = f"f{t}_{r}" if self._live else f"load({self._at(t, r)})"
            value = f"add(multiply({total}, m), {before})"
            if self._live:
                return [f"      f{t}_{r} = {value};"]
            return [f"      store({self._at(t, r)}, {value});"]
        before = f"f{t}_{r}" if self._live else f"load_floats({self._at(t, r)})"
        lines = []
        if not asym and self.bits != 8:
            start = f"broadcast(tile.minus128 + {index})"
            lines += [f"      Ints i{t}_{r} = add(multiply({total}, m), {start});"]
            lines += [f"      dot_halves(i{t}_{r}, c, broadcast(tile.halves + {index}));"]
            total = f"i{t}_{r}"
        scale = f"broadcast_float(tile.scales + {index})"
        if not asym:
            value = f"fused(to_float({total}), {scale}, {before})"
        elif groups:
            value = f"fused(multiply(to_float({total}), s), {scale}, {before})"
        else:
            value = f"fused(to_float({total}), s, {before})"
        if self._live:
            return [*lines, f"      f{t}_{r} = {value};"]
        return [*lines, f"      store_floats({self._at(t, r)}, {value});"]
