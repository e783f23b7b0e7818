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
    """One kernel: `tokens` times vectors `first` … `first + count − 1` of a panel's rows."""

    isa: Isa
    scheme: Scheme
    bits: int
    tokens: int
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"w{self.bits}_t{self.tokens}_r{self.first}"

    @property
    def _vectors(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def _cells(self) -> list[tuple[int, int]]:
        return [(t, r) for t in range(self.tokens) for r in self._vectors]

    @property
    def _flat(self) -> bool:
        """Whether one integer accumulator serves all of K."""
        return self.scheme.integer and self.bits == 8

    @property
    def _sets(self) -> str:
        """Names of accumulators: a second set where few of them would wait for each other."""
        return "ab" if self.isa.vnni and len(self._cells) < 8 else "a"

    @property
    def _live(self) -> bool:
        """Whether the results of the groups so far stay in registers too."""
        used = len(self._cells) * (1 + len(self._sets)) + self.count + 4
        return used <= self.isa.registers

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
        lines += self._start()
        chunk = LANES[self.bits].steps * self._unroll
        if self._flat:
            lines += [f"  for (long i = 0; i < groups * steps / {chunk}; i++) {{"]
            lines += [*self._chunk(), "  }"]
            lines += [f"  store({self._at(t, r)}, {self._total(t, r)});" for t, r in self._cells]
            return "\n".join([*lines, "}"])
        lines += ["  for (long g = 0; g < groups; g++) {", "    const uint8_t* meta = w;"]
        lines += [f"    w += {self._meta_bytes};"] if self._meta_bytes else []
        lines += self._start_group()
        lines += [f"    for (long i = 0; i < steps / {chunk}; i++) {{"]
        lines += [*self._chunk(), "    }"]
        lines += self._end_group()
        if not self._live:
            # Or gcc forwards `out` from one group to the next through stack slots.
            lines += ["    FENCE;"]
        lines += ["  }"]
        if self._live:
            put = "store" if self.scheme.integer else "store_floats"
            lines += [f"  {put}({self._at(t, r)}, f{t}_{r});" for t, r in self._cells]
        return "\n".join([*lines, "}"])

    @property
    def _meta_bytes(self) -> int:
        if self.scheme.family == "two-level":
            return 0 if self.bits == 8 else 64
        return 128 if self.bits == 8 else 192

    @property
    def _unroll(self) -> int:
        """Units of one turn of the loop; groups are whole multiples of 8 steps."""
        return max(1, (4 if self.isa.vnni else 8) // LANES[self.bits].steps)

    def _start(self) -> list[str]:
        """Accumulators of all of K, and where rows of a panel begin."""
        rows, lines = self.isa.rows, []
        two_level = self.scheme.family == "two-level"
        if two_level:
            lines += ["  w += 256;"]
        if self.scheme.integer:
            names = "a" if self._flat else "f"
            start = "zero()" if self._signed else "broadcast(tile.minus128 + {t})"
            lines += [f"  Ints {names}{t}_{r} = {start.format(t=t)};" for t, r in self._cells]
            if self.bits == 8:
                more = self._sets[1:]
                return [
                    *lines,
                    *(f"  Ints {more}{t}_{r} = zero();" for t, r in self._cells if more),
                ]
            lines += ["  for (long h = 0; h < (groups + 1) / 2; h++, w += 128) {"]
            for r in self._vectors:
                lines += [f"    const Ints c{r} = bytes_to_halves(w + {2 * rows * r});"]
            for t in range(self.tokens):
                halves = f"broadcast(tile.halves + h * {self.tokens} + {t})"
                lines += [f"    {{ const Ints s = {halves};"]
                lines += [f"      dot_halves(f{t}_{r}, c{r}, s);" for r in self._vectors]
                lines += ["    }"]
            lines += ["  }"]
            if not self._live:
                lines += [f"  store({self._at(t, r)}, f{t}_{r});" for t, r in self._cells]
            return lines
        if two_level and self.bits != 8:
            lines += ["  const uint8_t* offsets = w;", "  w += (groups + 1) / 2 * 128;"]
        if self._live:
            lines += [f"  Floats f{t}_{r} = zero_floats();" for t, r in self._cells]
        else:
            lines += [f"  store_floats({self._at(t, r)}, zero_floats());" for t, r in self._cells]
        return lines

    def _start_group(self) -> list[str]:
        """What the accumulators of a group start with."""
        rows, lines = self.isa.rows, []
        asym = self.scheme.family == "asym"
        for t in range(self.tokens):
            index = f"g * {self.tokens} + {t}"
            for r in self._vectors:
                start = "zero()"
                if self.bits == 8 and not self._signed:
                    start = f"broadcast(tile.minus128 + {index})"
                elif asym and self.bits <= 4 and self.isa.looks_up:
                    z = f"bytes_to_ints(meta + {128 + r * rows})"
                    start = f"look_up({z}, tile.table + ({index}) * 16)"
                lines += [f"    Ints a{t}_{r} = {start};"]
                if asym and self.bits < 8 and not (self.bits <= 4 and self.isa.looks_up):
                    z = f"bytes_to_ints(meta + {128 + r * rows})"
                    lines += [f"    dot_halves(a{t}_{r}, {z}, broadcast(tile.halves + {index}));"]
                if "b" in self._sets:
                    lines += [f"    Ints b{t}_{r} = zero();"]
        return lines

    def _chunk(self) -> list[str]:
        """The products of one turn of the loop over a group."""
        lanes = LANES[self.bits]
        lines: list[str] = []
        if self.first == 0:  # the other vectors of a panel find it in the cache
            lines += [f"      prefetch<{lanes.unit_bytes * self._unroll // 64}>(w);"]
        for unit in range(self._unroll):
            for j, fields in enumerate(lanes.fields):
                step = unit * lanes.steps + j
                lines += ["      {"]
                for r in self._vectors:
                    code = self._code(fields, unit, r)
                    lines += [f"        const Ints q{r} = {code};"]
                for t in range(self.tokens):
                    place = STEP * (step * self.tokens + t)
                    lines += [f"        {{ const Ints y = broadcast(x + {place});"]
                    lines += [f"          {self._product(t, r, step)}" for r in self._vectors]
                    lines += ["        }"]
                # Or gcc keeps words for later steps, and spills accumulators for them.
                lines += ["        FENCE;"] if self.tokens > 1 and self.isa.vnni else []
                lines += ["      }"]
                lines = self._with_flush(lines, step)
        codes, activations = lanes.unit_bytes * self._unroll, lanes.steps * self._unroll
        return [*lines, f"      w += {codes}; x += {STEP * self.tokens * activations};"]

    def _product(self, t: int, r: int, step: int) -> str:
        if self.isa.vnni:
            return f"dot({self._sets[step % len(self._sets)]}{t}_{r}, q{r}, y);"
        if self._signed:
            return f"dot_signed(a{t}_{r}, q{r}, y);"
        first = step % FLUSH[self.bits] == 0
        new = f"products(q{r}, y)"
        return f"d{t}_{r} = {new if first else f'add_halves(d{t}_{r}, {new})'};"

    def _with_flush(self, lines: list[str], step: int) -> list[str]:
        """Without VNNI: sums of int16 go to the accumulators before they can overflow."""
        if self.isa.vnni or self._signed:
            return lines
        if step == 0:
            lines = [*(f"      Ints d{t}_{r};" for t, r in self._cells), *lines]
        if step % FLUSH[self.bits] == FLUSH[self.bits] - 1:
            lines += [f"      flush(a{t}_{r}, d{t}_{r});" for t, r in self._cells]
        return lines

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

    def _end_group(self) -> list[str]:
        """Add the products of a group to the results, with its metadata."""
        rows, lines = self.isa.rows, []
        asym, groups = self.scheme.family == "asym", self.scheme.mode == "group"
        if groups and not asym and self.bits != 8:
            lines += ["    const uint8_t* pair = offsets + g / 2 * 128;"]
        for r in self._vectors:
            lines += ["    {"]
            if asym:
                lines += [f"      const Floats s = half_floats(meta + {2 * rows * r});"]
            elif self.bits != 8:
                lines += [f"      const Ints m = bytes_to_ints(meta + {rows * r});"]
                if groups:
                    lines += [f"      const Ints c = bytes_to_halves(pair + {2 * rows * r});"]
            for t in range(self.tokens):
                lines += self._end_cell(t, r)
            lines += ["    }"]
        return lines

    def _total(self, t: int, r: int) -> str:
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
