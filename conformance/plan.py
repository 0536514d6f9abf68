"""Which cases a level has: groups of shapes, settings, values and calls, for one dtype and direction.

The groups, in order: shapes, options (each value alone, rules of who sees whom two at a time, then pairs), stated (what
the mechanism's file asks for itself), values, hidden (NaN and sentinels behind masks), probes, layouts, calls
(determinism, other options, other batches, decoding, changed unseen keys), small (exhaustive small scope), long
(sampled rows), refusals; and gradients. A combination that the mechanism's constraints forbid, or that needs what the
candidate does not take, does not arise. Used by `cases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnspec.conformance import exhaustive, probes, shapes
from attnspec.conformance.case_id import CaseError, make
from attnspec.conformance.gathers import MOST, gathered
from attnspec.conformance.seeing import deciding, hides_by_default
from attnspec.conformance.settings import PLAIN, Setting, alone, merged, pairs
from attnspec.conformance.types import Case, Direction, Level
from attnspec.spec.mechanism import Mechanism

LAYOUTS = ("transposed", "swapped", "strided", "padded", "offset", "misaligned")
MEETINGS = {"smoke": 0, "standard": 30, "exhaustive": 200}
PAIRS = {"smoke": 3, "standard": 14, "exhaustive": 200}
MASKING = ("mask", "segment", "length", "page_table")
"""Roles of inputs that decide which keys a query sees."""

TURNED = {**shapes.BASE, "queries": 23, "keys": 14}
TILES_TURNED = {**shapes.TILES, "queries": 131, "keys": 67}
FAR = "far"
"""Products of queries and keys beyond fp16, logits within it: not for kernels that write their logits in the dtype."""
ORDERS = frozenset({"rank", "argsort", "argmax"})
NOTHING = {**shapes.BASE, "queries": 0, "keys": 0}
ONE_QUERY = {**shapes.BASE, "queries": 1}
SQUARE = {**shapes.BASE, "queries": 21, "keys": 21}
PROBE = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 37, "keys": 43, "feature": 32, "value_feature": 32}
PROBE_TURNED = {**PROBE, "queries": 43, "keys": 29}
MANY_KEYS = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 5, "keys": 1100, "feature": 16, "value_feature": 16}
_NARROW = {"batch": 1, "heads": 1, "kv_heads": 1, "feature": 32, "value_feature": 32}
LONG = {
    "smoke": ({**_NARROW, "queries": 5, "keys": 2053},),
    "standard": ({**_NARROW, "queries": 4096, "keys": 4096}, {**_NARROW, "queries": 5, "keys": 16389}),
    "exhaustive": (
        {**_NARROW, "queries": 4096, "keys": 4096},
        {**_NARROW, "queries": 131072, "keys": 131072},
        {**_NARROW, "queries": 7, "keys": 131071},
    ),
}
GRADIENT_SHAPES: tuple[Mapping[str, int], ...] = (
    shapes.BASE,
    shapes.TILES,
    {**shapes.BASE, "queries": 1, "keys": 37},
    {**shapes.BASE, "batch": 1, "queries": 3, "keys": 0},
    {**shapes.BASE, "batch": 1, "queries": 0, "keys": 3},
    {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 1, "keys": 1, "feature": 1, "value_feature": 1},
    {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 33, "keys": 65, "feature": 24, "value_feature": 24},
    {"batch": 1, "heads": 6, "kv_heads": 2, "queries": 9, "keys": 19, "feature": 33, "value_feature": 33},
    {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 9, "keys": 19, "feature": 128, "value_feature": 128},
    {**shapes.BASE, "value_feature": 8},
    {**shapes.BASE, "feature": 8, "value_feature": 24},
)


class Plan:
    """Collects the cases of one level, dtype and direction."""

    def __init__(
        self, mechanism: Mechanism, level: Level, dtype: str, direction: Direction, seed: int,
        taken: frozenset[str], required: tuple[str, ...],
    ) -> None:  # fmt: skip
        self.mechanism = mechanism
        self.level = level
        self.dtype = dtype
        self.direction = direction
        self.seed = seed
        self.taken = taken
        self.required = required
        self.cases: list[Case] = []
        self.settings = [setting for setting in alone(mechanism, level) if setting.within(taken)]
        self.parts = shapes.roles(mechanism)

    def add(
        self, group: str, sizes: Mapping[str, int] = shapes.BASE, setting: Setting = PLAIN, *,
        values: str = "normal", layout: str = "contiguous", check: str = "tolerance",
        broadcast: Mapping[str, str] | None = None, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """One case, unless the constraints forbid it or the candidate does not take what it needs."""
        chosen = {**setting.options, **(options or {})}
        inputs = (*self.required, *setting.inputs)
        if not (set(chosen) | set(inputs)) <= self.taken or set(setting.absent) & set(self.required):
            return
        for wanted in shapes.alternatives(sizes):
            try:
                case = make(
                    self.mechanism, group, sizes=wanted, options=chosen, inputs=inputs, absent=setting.absent,
                    broadcast=broadcast, values=values, layout=layout, dtype=self.dtype, direction=self.direction,
                    check=check, level=self.level, seed=self.seed,
                )  # fmt: skip
                break
            except CaseError:
                continue
        else:
            return
        present = {name for name, decl in self.mechanism.inputs.items() if not decl.optional} | set(case.inputs)
        if present <= self.taken | {name for name, d in self.mechanism.inputs.items() if not d.optional}:
            self.cases.append(case)

    def of(self, *names: str) -> list[Setting]:
        """The settings that stand for one of these inputs or options."""
        return [setting for setting in self.settings if set(names) & set(setting.names)]

    def states(self) -> list[Setting]:
        """Settings that bring a state to start from."""
        return [
            setting for setting in self.settings
            if any(self.mechanism.inputs[name].role == "state" for name in setting.inputs)
        ]  # fmt: skip

    def masking(self) -> list[Setting]:
        """Settings that change which keys a query sees."""
        single: list[Setting] = []
        for setting in self.settings:
            by_input = any(self.mechanism.inputs[name].role in MASKING for name in setting.inputs)
            if by_input or deciding(self.mechanism) & set(setting.options):
                single.append(setting)
        return single

    def hiding(self) -> list[Setting]:
        """The same, and before them no setting at all where keys are hidden by default."""
        return [*([PLAIN] if hides_by_default(self.mechanism) else []), *self.masking()]

    def meeting(self) -> list[Setting]:
        """Settings in which every two different rules of who sees whom meet."""
        return pairs(self.mechanism, _first_of_each(self.masking()), 3, MEETINGS[self.level])

    def small(self) -> bool:
        return self.level == "smoke"

    # Forward

    def forward(self) -> None:
        """All groups of the forward direction."""
        self.shapes()
        self.options()
        self.stated("stated")
        self.values()
        self.hidden()
        self.probes()
        if self.small():
            self.add("layouts", layout="transposed")
        else:
            self.layouts()
            self.calls()
            self.scopes()
        self.long()
        self.refusals()

    def shapes(self) -> None:
        for sizes in shapes.families(self.mechanism, self.level, self._present()):
            self.add("shapes", sizes)

    def _present(self) -> tuple[str, ...]:
        usual = set(self.mechanism.usual) | set(self.required)
        return tuple(name for name, decl in self.mechanism.inputs.items() if not decl.optional or name in usual)

    def options(self) -> None:
        if self.small():
            for setting in _first_of_each(self.settings):
                self.add("options", setting=setting)
            return
        for setting in self.settings:
            self.add("options", setting=setting)
        for setting in _first_of_each(self.of(*sorted(deciding(self.mechanism)))):
            for sizes in (TURNED, ONE_QUERY, shapes.TILES, TILES_TURNED):
                self.add("options", sizes, setting)
        for number, setting in enumerate(self.meeting()):
            self.add("options", (TURNED, shapes.BASE)[number % 2], setting)
        for setting in self.states():
            for sizes in (NOTHING, shapes.TILES):
                self.add("options", sizes, setting)
        nullable = {name: None for name, decl in self.mechanism.options.items() if decl.nullable and name in self.taken}
        if nullable:
            self.add("options", options=nullable)
        for name, decl in self.mechanism.inputs.items():
            for single in _broadcasts(decl.broadcast, every=self.level == "exhaustive"):
                for setting in self.of(name)[:1]:
                    self.add("options", setting=setting, broadcast={name: single})
        some = self.settings if self.level == "exhaustive" else _first_of_each(self.settings)
        for number, setting in enumerate(pairs(self.mechanism, some, 2 if len(some) <= 5 else 4, PAIRS[self.level])):
            self.add("options", (shapes.BASE, TURNED)[number % 2], setting)

    def stated(self, group: str) -> None:
        """The cases that the mechanism's file states (`[[case]]`)."""
        if self.small():
            return
        for entry in self.mechanism.cases:
            setting = Setting((), entry.options, entry.inputs)
            self.add(group, {**shapes.BASE, **entry.sizes}, setting, values=entry.values)

    def emptying(self) -> Mapping[str, Any]:
        """Options under which some rows of `TURNED` see nothing, where there are such."""
        return next((setting.options for setting in self.of("causal") if not setting.inputs), {})

    def values(self) -> None:
        self.add("values", shapes.WIDE, values="rising")
        self.add("values", values="large")
        if self.small():
            return
        for recipe, sizes in (
            ("falling", shapes.WIDE), ("last_key", shapes.TILES), ("needles", shapes.TILES), ("equal", shapes.BASE),
            ("constant_v", shapes.BASE), ("positive", MANY_KEYS), ("tiny", shapes.BASE), ("denormal", shapes.BASE),
            ("heads_apart", {**shapes.BASE, "kv_heads": 4}),
        ):  # fmt: skip
            self.add("values", sizes, values=recipe)
        for setting in self.of("causal")[:1]:
            self.add("values", shapes.TILES, setting, values="rising")
        if any(self.mechanism.inputs[name].role == "gate" for name in self._present()):
            for recipe in ("no_decay", "slow_decay", "fast_decay"):
                self.add("values", shapes.TILES, values=recipe)
        for name, decl in self.mechanism.inputs.items():
            for setting in self.of(name)[:1]:
                if decl.role == "bias":
                    self.add("values", setting=setting, values="bias_inf")
                    self.add("values", setting=setting, values="empty_rows")
                elif decl.role == "mask":
                    for recipe in ("empty_rows", "low_logits"):
                        self.add("values", setting=setting, values=recipe)
                    self.add("values", shapes.TILES, setting, values="leading_masked")
                    if self.level == "exhaustive" and self.dtype == "fp16":
                        wide = {**shapes.BASE, "feature": 64, "value_feature": 64}
                        self.add(FAR, wide, setting, values="low_logits")
                elif decl.role == "sink":
                    self.add("values", setting=setting, values="big_sink")
                    self.add("values", TURNED, setting, values="absent_sink", options=self.emptying())

    def hidden(self) -> None:
        told = "keep" in self.mechanism.program.definitions  # else nothing says which key is hidden from whom
        if self.small():
            for setting in self.hiding()[:2] if told else ():
                self.add("hidden", shapes.BASE, setting, values="future_nan")
            return
        three = {**shapes.BASE, "batch": 3}
        if not shapes.operators(self.mechanism) & ORDERS:  # an order of NaN is undefined, in a neighbour too
            self.add("hidden", three, values="neighbour_nan")
        if not told:
            return
        for setting in self.masking():
            given = {self.mechanism.inputs[name].role for name in setting.inputs}
            if given & {"length", "segment", "page_table"}:
                self.add("hidden", setting=setting, values="unseen_nan")
        for setting in _first_of_each(self.hiding()):
            self.add("hidden", TILES_TURNED, setting, values="future_big")
        for setting in _first_of_each(self.hiding())[:3]:
            self.add("hidden", setting=setting, values="future_nan")
            self.add("hidden", TURNED, setting, values="future_inf")

    def probes(self) -> None:
        if not probes.fits(self.mechanism):
            return
        self.add("probes", PROBE, values="key_set", check=probes.CHECK)
        masks = _first_of_each(self.masking()) if self.small() else self.masking()
        for setting in masks:
            self.add("probes", PROBE, setting, values="key_set", check=probes.CHECK)
        if self.small():
            return
        aimed = probes.aims(self.mechanism)
        if aimed:
            self.add("probes", shapes.WIDE, values="aim", check=probes.CHECK)
        self.add("probes", shapes.TILES, values="visible", check=probes.CHECK)
        for setting in _first_of_each(self.masking()):
            self.add("probes", shapes.WIDE, setting, values="visible", check=probes.CHECK)
            self.add("probes", PROBE_TURNED, setting, values="key_set", check=probes.CHECK)
        for setting in self.of("causal", "window_left") if aimed else ():
            self.add("probes", TILES_TURNED, setting, values="aim", check=probes.CHECK)

    def layouts(self) -> None:
        for layout in LAYOUTS:
            self.add("layouts", layout=layout)
        self.add("layouts", values="same_batch", layout="expanded")
        tensors = [name for name in self._present() if self.mechanism.inputs[name].role in ("query", "key", "value")]
        for number, name in enumerate(tensors):
            self.add("layouts", layout=f"{LAYOUTS[number % 3]}:{name}")
            self.add("layouts", shapes.TILES, layout=f"{LAYOUTS[(number + 1) % 3]}:{name}")
        for name, decl in self.mechanism.inputs.items():
            if decl.role == "bias":
                for setting in self.of(name)[:1]:
                    self.add("layouts", setting=setting, layout=f"transposed:{name}")

    def calls(self) -> None:
        self.add("calls", shapes.TILES, check="determinism")
        self.add("calls", {**shapes.BASE, "batch": 3}, check="batch")
        for setting in _first_of_each([entry for entry in self.settings if entry.options and not entry.inputs]):
            self.add("calls", setting=setting, check="sequence")
        causal = self.of("causal")[:1] or ([] if "causal" in self.mechanism.options else [PLAIN])
        for setting in causal:
            self.add("calls", SQUARE, setting, check="decode")
        for setting in _first_of_each(self.hiding()):
            self.add("calls", setting=setting, check="perturb")

    def scopes(self) -> None:
        everything = exhaustive.available(
            self.mechanism, set(self.taken & set(self.mechanism.inputs)), set(self.taken & set(self.mechanism.options))
        )
        for name, (inputs, options) in everything.items():
            if name.endswith("_full") and self.level != "exhaustive":
                continue
            setting = Setting((name,), options, inputs)
            self.add("small", exhaustive.SIZES[name], setting, values=name)
            if name.startswith("every_window"):
                for other in self.of("causal", "causal_alignment"):
                    both = Setting((name,), {**other.options, **options}, inputs)
                    self.add("small", exhaustive.SIZES[name], both, values=name)

    def long(self) -> None:
        fitting = [self.fitting(sizes) for sizes in LONG[self.level]]
        for sizes in (sizes for at, sizes in enumerate(fitting) if sizes not in fitting[:at]):
            for setting in [*self.of("causal")[:1]] or [PLAIN]:
                self.add("long", sizes, setting)
                if probes.fits(self.mechanism):
                    self.add("long", sizes, setting, values="visible", check=probes.CHECK)
            if not self.small() and probes.fits(self.mechanism):
                for setting in self.of("window_left")[:1]:
                    self.add("long", sizes, setting, values="visible", check=probes.CHECK)

    def fitting(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes with queries and keys halved until the equations fit into memory."""
        present = [name for name, decl in self.mechanism.inputs.items() if not decl.optional]
        while sizes["queries"] > 1 and gathered(self.mechanism, shapes.sizes_of(self.mechanism, sizes, present)) > MOST:
            sizes = {**sizes, "queries": sizes["queries"] // 2, "keys": sizes["keys"] // 2}
        return sizes

    def refusals(self) -> None:
        if self.small():
            return
        kinds = ("query", "key", "value")
        if all(any(self.mechanism.inputs[name].role == role for name in self._present()) for role in kinds):
            for what in ("bad_features", "bad_keys", "bad_batch"):
                self.add("refusals", values=what, check="refusal")
            if {"heads", "kv_heads"} <= set(self.parts.names):
                self.add("refusals", values="bad_heads", check="refusal")
            for setting in self.of("mask")[:1]:
                self.add("refusals", setting=setting, values="bad_mask", check="refusal")

    # Backward

    def backward(self) -> None:
        """Gradients: the shapes, settings and values that break a backward pass."""
        if self.mechanism.gradient is None:
            return
        for sizes in GRADIENT_SHAPES[: 3 if self.small() else None]:
            self.add("gradients", sizes)
        for setting in _first_of_each(self.settings) if self.small() else self.settings:
            self.add("gradients", setting=setting)
        self.add("gradients_all")
        for setting in self.states():
            for sizes in (shapes.BASE, NOTHING, ONE_QUERY, shapes.TILES):
                self.add("gradients_all", sizes, setting)
        if self.small():
            return
        for setting in _first_of_each(self.settings):
            self.add("gradients_all", TURNED, setting)
        for setting in _first_of_each(self.of(*sorted(deciding(self.mechanism)))):
            self.add("gradients", TURNED, setting)
            self.add("gradients", TILES_TURNED, setting)
        self.stated("gradients_stated")
        gated = any(self.mechanism.inputs[name].role == "gate" for name in self._present())
        for recipe in ("no_decay", "slow_decay", "fast_decay") if gated else ():
            self.add("gradients", shapes.TILES, values=recipe)
        for recipe in ("large", "rising", "needles", "heads_apart", "last_key"):
            self.add("gradients", shapes.TILES if recipe in ("rising", "last_key") else shapes.BASE, values=recipe)
        for name, decl in self.mechanism.inputs.items():
            for setting in self.of(name)[:1]:
                if decl.role in ("bias", "mask"):
                    self.add("gradients", setting=setting, values="empty_rows")
                if decl.role == "sink":
                    self.add("gradients_all", TURNED, setting, values="absent_sink", options=self.emptying())
                for single in _broadcasts(decl.broadcast, every=False) if decl.differentiable else ():
                    self.add("gradients", setting=setting, broadcast={name: single})
                if decl.role in ("length", "segment"):
                    self.add("gradients", setting=setting, values="unseen_nan")
                    for other in self.of("bias", "softcap"):
                        both = merged(self.mechanism, [setting, other])
                        if both is not None:
                            self.add("gradients", setting=both, values="unseen_nan")
                if decl.role == "sink":
                    self.add("gradients", setting=setting, values="big_sink")
        for layout in ("swapped", "strided", "transposed:V"):
            self.add("gradients", layout=layout)
        self.add("gradients", check="determinism")
        for setting in self.of("causal", "scale")[:2]:
            self.add("gradients", setting=setting, check="sequence")
        some = _first_of_each(self.settings)
        met = pairs(self.mechanism, some, 2 if len(some) <= 5 else 4, PAIRS[self.level] // 2)
        for number, setting in enumerate(met):
            self.add("gradients", (TURNED, shapes.BASE)[number % 2], setting)


def _first_of_each(settings: Iterable[Setting]) -> list[Setting]:
    """The first setting of every name or group of names."""
    found: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        found.setdefault(setting.names, setting)
    return list(found.values())


def _broadcasts(axes: Sequence[str], *, every: bool) -> list[str]:
    """Which axes have length 1: each alone and all together; every subset where asked for."""
    if not axes:
        return []
    if every:
        numbers = range(1, 2 ** len(axes))
        return ["".join(axis for bit, axis in enumerate(axes) if number >> bit & 1) for number in numbers]
    return list(dict.fromkeys((*axes, "".join(axes[:2]), "".join(axes))))
