"""Cache policies in one word, as command lines and tables name them: `hack:0.3+int8`.

    NAME[:AMOUNT][,OPTION=VALUE ...][+STORAGE]

AMOUNT: a share of the tokens that a full cache stores (0.3), or tokens (127t); for `sliding` a number of scales.
OPTION: a hyper-parameter of the policy. STORAGE: how keys and values lie in memory.

    full                 sliding:2,condensed=1           h2o:127t,recent=0.25         scalekv:0.1,compat=upstream
    hack:0.3+int8        hack,attention=0.3              full+bf16                    snapkv:0.3+mixed
    h2o:0.3,interval=8   (raster models drop at every eighth token, a quarter faster, within the same budget)

Reading a word imports no torch, so that a mistake in it is answered at once; `PolicySpec.build` makes the policy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vtc.errors import ConfigError

if TYPE_CHECKING:
    from vtc.generators.kv_cache.calibration import Calibration
    from vtc.generators.kv_cache.policy import KVPolicy
    from vtc.generators.kv_cache.schedule import Schedule
    from vtc.generators.kv_cache.storage import Storage

#: +STORAGE, and other ways to write it
STORAGES = ("float32", "bf16", "fp16", "int8", "int4", "mixed")
_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "fp32": "float32", "zipvl": "mixed"}

Value = int | float | bool | str


@dataclass(frozen=True)
class Budget:
    """AMOUNT: a share of the stored tokens, or a whole number of tokens."""

    number: float
    unit: Literal["share", "tokens"]

    def tokens(self, schedule: Schedule, of: Literal["stored", "all"] = "stored") -> int:
        """In tokens of a model. ConfigError where it is no share of them."""
        from vtc.generators.kv_cache.policy import budget_from_ratio

        return int(self.number) if self.unit == "tokens" else budget_from_ratio(schedule, self.number, of)

    def __str__(self) -> str:
        return f"{int(self.number)}t" if self.unit == "tokens" else f"{self.number:g}"


@dataclass(frozen=True)
class Kind:
    """A policy that has a name.

    make: of a model's schedule, the budget in tokens (or scales), the options, and a calibration.
    amount: what AMOUNT counts; None: it takes none.
    options: names and types of what it takes beside. calibrated: whether it needs a calibration.
    """

    about: str
    make: Callable[[Schedule, int | None, dict[str, Any], Any], KVPolicy]
    amount: Literal["tokens", "scales"] | None = "tokens"
    options: Mapping[str, type] = field(default_factory=dict)
    calibrated: bool = False


@dataclass(frozen=True)
class PolicySpec:
    """What a word says. `str(spec)` is the word again, in its plainest form."""

    name: str
    budget: Budget | int | None = None
    options: tuple[tuple[str, Value], ...] = ()
    storage: str | None = None

    @property
    def kind(self) -> Kind:
        """The policy of that name."""
        return POLICIES[self.name]

    @property
    def needs_calibration(self) -> bool:
        """Whether `build` wants a calibration."""
        return self.kind.calibrated

    def build(self, schedule: Schedule, calibration: Calibration | None = None) -> tuple[KVPolicy, Storage]:
        """The policy and the storage for a model, as `KVCache(schedule, *...)` takes them.

        ConfigError where the policy needs a calibration and there is none, or has no meaning for such a model.
        """
        if self.needs_calibration and calibration is None:
            raise ConfigError(f"{self.name} is about heads and layers that a calibration has measured, and there is "
                              "none of this model: make one by scripts/calibrate_kv.py.")
        amount = self.budget.tokens(schedule) if isinstance(self.budget, Budget) else self.budget
        policy = self.kind.make(schedule, amount, dict(self.options), calibration)
        policy.check(schedule)
        everything = self.kind.amount == "tokens" and (amount or 0) >= schedule.stored_tokens
        if everything and "attention" not in dict(self.options):
            policy = POLICIES["full"].make(schedule, None, {}, None)  # who may keep all, drops nothing
        return policy, _storage(self.storage)

    def __str__(self) -> str:
        return (self.name + (f":{self.budget}" if self.budget is not None else "")
                + "".join(f",{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in self.options)
                + (f"+{self.storage}" if self.storage else ""))


def parse_policy(text: str, storage: str | None = None) -> PolicySpec:
    """What a word says. storage: what it stores in where the word itself does not say.

    ConfigError with what there is, where a name, an option or a number is none.
    """
    word, plus, said = text.strip().partition("+")
    if plus and storage and parse_storage(said) != parse_storage(storage):
        raise ConfigError(f"The storage is {said} in {text!r} and {storage} beside it; say it once.")
    chosen = parse_storage(said) if plus else parse_storage(storage) if storage else None
    head, *rest = word.split(",")
    name, colon, amount = head.partition(":")
    name = name.strip().lower()
    if name not in POLICIES:
        raise ConfigError(f"There is no cache policy {name!r}: there are {', '.join(POLICIES)}.")
    kind = POLICIES[name]
    options = tuple(_option(name, kind, item) for item in rest)
    if len(dict(options)) != len(options):
        raise ConfigError(f"{text!r} says an option twice.")
    budget = _amount(name, kind, amount.strip()) if colon else None
    if budget is None and kind.amount is not None and "attention" not in dict(options):
        example = "2" if kind.amount == "scales" else "0.3"
        what = ("how many of the newest scales stay" if kind.amount == "scales" else
                "which share of the stored tokens stays, or how many, as in 127t")
        raise ConfigError(f"{name} wants to know {what}: {name}:{example}.")
    return PolicySpec(name, budget, options, chosen)


def parse_storage(text: str) -> str:
    """The name of a way to store, in its plainest form. ConfigError."""
    name = _ALIASES.get(text.strip().lower(), text.strip().lower())
    if name not in STORAGES:
        raise ConfigError(f"Keys and values are stored as one of {', '.join(STORAGES)}, not {text!r}.")
    return name


def _amount(name: str, kind: Kind, text: str) -> Budget | int:
    if kind.amount is None:
        raise ConfigError(f"{name} takes no amount: {text!r} says nothing to it.")
    if kind.amount == "scales":
        if not re.fullmatch(r"[0-9]{1,3}", text) or int(text) < 1:
            raise ConfigError(f"{name} takes a number of scales from 1 up, not {text!r}.")
        return int(text)
    return parse_budget(text)


def parse_budget(text: str) -> Budget:
    """0.3 or 127t. ConfigError."""
    if re.fullmatch(r"[0-9]{1,9}t", text) and int(text[:-1]) >= 1:
        return Budget(int(text[:-1]), "tokens")
    if re.fullmatch(r"[0-9]{0,3}\.?[0-9]{0,12}", text) and re.search(r"[1-9]", text) and float(text) <= 1:
        return Budget(float(text), "share")
    raise ConfigError(f"A budget is a share of the stored tokens above 0 and up to 1, or a number of tokens with a t "
                      f"behind it, as 127t, not {text!r}.")


def _option(name: str, kind: Kind, item: str) -> tuple[str, Value]:
    key, equals, text = (part.strip() for part in item.partition("="))
    if not equals or key not in kind.options:
        raise ConfigError(f"{name} has no option {item.strip()!r}: " + (
            f"it takes {', '.join(f'{k}=' for k in kind.options)}." if kind.options else "it takes none."))
    wanted = kind.options[key]
    try:
        if wanted is Budget:
            parse_budget(text)
            return key, text
        if wanted is bool:
            return key, {"true": True, "false": False}[text.lower()]
        return key, wanted(text)
    except (ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        what = "true or false" if wanted is bool else f"a number ({wanted.__name__})"
        raise ConfigError(f"{name}'s {key} is {what}, not {text!r}.") from error


def _storage(name: str | None) -> Storage:
    if name is None or name in ("int8", "int4"):
        return name  # type: ignore[return-value]  # the two literals, or None
    import torch

    from vtc.generators.kv_cache.storage import MixedPrecision

    if name == "mixed":
        return MixedPrecision()
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# ---- the policies, each imported when it is made --------------------------------------------------------------------

def _full(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Any) -> KVPolicy:
    from vtc.generators.kv_cache.full import Full

    return Full()


def _sliding(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Any) -> KVPolicy:
    from vtc.generators.kv_cache.sliding import SlidingScales

    return SlidingScales(amount or 1, **options)


def _tokens(module: str, name: str) -> Callable[[Schedule, int | None, dict[str, Any], Any], KVPolicy]:
    """A policy of a plain budget of tokens."""

    def make(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Any) -> KVPolicy:
        from importlib import import_module

        from vtc.generators.kv_cache.wrappers import AtIntervals

        assert amount is not None  # required
        kind = getattr(import_module(f"vtc.generators.kv_cache.{module}"), name)
        interval = options.pop("interval", 1)
        if not 1 <= interval <= amount:
            raise ConfigError(f"An interval is from 1 token up to the budget, here {amount}, not {interval}.")
        # Between two drops there are up to interval - 1 tokens above the budget, which shall hold for those too.
        policy = kind(tokens=amount - interval + 1, **options)
        return policy if interval == 1 else AtIntervals(policy, interval)

    return make


def _hack(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Calibration) -> KVPolicy:
    from dataclasses import replace

    heads = options.pop("share", 0.5)
    attention = parse_budget(options.pop("attention")).tokens(schedule, "all") if "attention" in options else None
    policy = calibration.hack(amount, attention, heads)
    if "contextual_share" not in options:
        # A structural head cannot have more than all there is: what is above that goes to the contextual ones.
        options["contextual_share"] = max([1 / 3, *(_no_waste(mean, most, heads) for mean, most in (
            (amount, schedule.stored_tokens), (attention, schedule.all_tokens)) if mean is not None)])
    return replace(policy, **options)


def _no_waste(mean: int, most: int, contextual: float) -> float:
    """The contextual share at which structural heads get `most` and the mean is met; 0 or less below that."""
    return min(1.0, (mean - (1 - contextual) * most) / (contextual * mean)) if contextual > 0 else 0.0


def _scalekv(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Calibration) -> KVPolicy:
    from dataclasses import replace

    assert amount is not None  # required
    policy = calibration.scalekv(amount, options.pop("drafters", None))
    return replace(policy, **options)


def _heatkv(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Calibration) -> KVPolicy:
    from dataclasses import replace

    assert amount is not None  # required
    return replace(calibration.heatkv(amount), **options)


def _adakv(schedule: Schedule, amount: int | None, options: dict[str, Any], calibration: Calibration) -> KVPolicy:
    from vtc.generators.kv_cache.snapkv import SnapKV
    from vtc.generators.kv_cache.wrappers import AdaptiveHeads, head_budgets

    assert amount is not None  # required
    groups = options.pop("groups", 4)
    base = SnapKV(amount, **options)
    # A fifth of the mean is every head's; the rest goes by need.
    least = max(base.window, round(0.2 * amount))
    return AdaptiveHeads(base, head_budgets(calibration.variance, amount, least, groups, schedule.stored_tokens))


_SNAPKV: dict[str, type] = {"window": int, "pool": int}
#: of raster models: tokens between two drops
_INTERVAL: dict[str, type] = {"interval": int}
#: name -> policy, in the order of papers
POLICIES: dict[str, Kind] = {
    "full": Kind("everything but the last scale, which nothing reads: the same pictures", _full, None),
    "sliding": Kind("the newest K whole scales", _sliding, "scales", options={"condensed": int}),
    "streaming": Kind("the first and the newest tokens (StreamingLLM)", _tokens("sliding", "StreamingLLM"),
                      options={"sinks": int} | _INTERVAL),
    "h2o": Kind("tokens with the most attention so far, and the newest (H2O)", _tokens("h2o", "H2O"),
                options={"recent": float, "queries": int, "decay": float} | _INTERVAL),
    "snapkv": Kind("tokens that a window of queries attends to (SnapKV)", _tokens("snapkv", "SnapKV"),
                   options=_SNAPKV | _INTERVAL),
    "pyramidkv": Kind("SnapKV, early layers with more than late ones (PyramidKV)", _tokens("snapkv", "PyramidKV"),
                      options=_SNAPKV | {"beta": float} | _INTERVAL),
    "hack": Kind("two kinds of heads, of which one needs little (HACK)", _hack, calibrated=True,
                 options={"attention": Budget, "share": float, "contextual_share": float, "queries": int,
                          "initial": int, "merge": bool}),
    "scalekv": Kind("layers that draft keep all, layers that refine little (ScaleKV)", _scalekv, calibrated=True,
                    options={"drafters": int, "refiner_start": int, "refiner_step": int, "compat": str,
                             "refiner_share": float} | _SNAPKV),
    "heatkv": Kind("whole scales of the heads that look at them (HeatKV)", _heatkv, calibrated=True,
                   options={"protected": int}),
    "adakv": Kind("SnapKV, with more for heads that spread their attention (Ada-KV)", _adakv, calibrated=True,
                  options=_SNAPKV | {"groups": int}),
}
