"""Keys and values of one attention layer in a `kv_cache.KVCache`: memory, what a step adds, what it hands out.

Layouts are those of quantkit_kernels/kv_layout.py. A layer with a window keeps its tokens in a ring of pages, through
which the table of pages goes again and again: position n is in slot n % ring. Codes of BLOCK tokens lie together and
are written together, so of tokens that come at once a ring takes BLOCK fewer than it has slots: both ends of what it
takes never fall into one block, which two programs of a GPU would write at once, each without the other's tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from quantkit.errors import InputError
from quantkit.runtime.attention import FEW, KV
from quantkit_kernels import kv_layout
from quantkit_kernels.kv_append import kv_append
from quantkit_kernels.kv_layout import BLOCK, HEAD_DIMS, MaybeTensor

if TYPE_CHECKING:
    from quantkit.runtime.kv_cache import KVCache

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PAGE = 64  # tokens of a page in the ring of a sliding layer: a multiple of every kernel's tile
SLACK = 64  # tokens that a ring keeps beyond its window, so that as many can be taken back
FIRST = 256  # tokens for which a growing cache has room after its first ones


class Clock:
    """How many tokens there are, for all layers of one device: before the step that is going on, and after it.

    The first layer that ever ran moves it; every layer runs once in a step. Python's own count is kept only where the
    cache grows: in a static cache it would have to be compiled anew with every token.
    """

    def __init__(self, batch: int, room: int | None, device: torch.device) -> None:
        self.before, self.after = (torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2))
        self.layers: list[KVLayer] = []
        self.room = room  # tokens of a static cache
        self.count = self.step = 0  # tokens of a growing one, and those of the last step
        self.highest = 0  # tokens that it had at most
        self.empty = True
        self.fresh = False  # it was empty before this step
        if not torch.compiler.is_compiling():
            _fix(self.before, self.after)

    def tick(self, layer: KVLayer, tokens: int) -> None:
        """Before a layer's part of a step. Raises InputError where layers do not take turns."""
        if layer is self.layers[0]:
            if any(other.waiting for other in self.layers):
                raise InputError("a step of this KVCache did not run through all layers; call its reset()")
            if self.room is not None:
                if self.empty and tokens > self.room:
                    raise InputError(f"{tokens} tokens for a KVCache of {self.room}; make one with more max_cache_len")
                full = f"a KVCache of {self.room} tokens is full; make one with a larger max_cache_len"
                if self.after.device.type == "cpu" and not torch.compiler.is_compiling():
                    if int(self.after[0]) + tokens > self.room:
                        raise InputError(full)
                else:
                    torch._assert_async(self.after[0] <= self.room - tokens, full)
            else:
                self.count, self.step = self.count + tokens, tokens
            self.fresh, self.empty = self.empty, False
            self.before.copy_(self.after)
            self.after.add_(tokens)
            for other in self.layers:
                other.waiting = True
        if not layer.waiting:
            raise InputError("a layer of this KVCache was updated twice in one step, or out of turn")
        layer.waiting = False

    def tokens(self) -> int:
        """How many there are, after the step. Waits for the device in a static cache."""
        return self.count if self.room is None else int(self.after[0])

    def known(self) -> int | None:
        """The same, or None where that would break a compiled graph."""
        return None if self.room is not None and torch.compiler.is_compiling() else self.tokens()

    def resize(self, batch: int) -> None:
        """Another batch; all rows have as many tokens."""
        if batch == self.after.numel():
            return
        self.before, self.after = (t[:1].expand(batch).clone() for t in (self.before, self.after))
        for layer in self.layers:
            layer.before, layer.after = self.before, self.after

    def set(self, tokens: int) -> None:
        """Between steps."""
        self.highest = max(self.highest, self.tokens()) if tokens else 0  # what a ring has written over
        self.count = tokens if self.room is None else 0
        self.empty = tokens == 0
        self.before.fill_(tokens)
        self.after.fill_(tokens)
        for layer in self.layers:
            layer.waiting = False


class KVLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    k_cache, v_cache, k_scale, v_scale, table  as in kv_layout.py: dense (B, H, L, ...), or a ring of pages, B R of them
    clock                                      there once it has memory
    """

    is_croppable = True
    is_initialized: bool
    clock: Clock

    def __init__(self, cache: KVCache, window: int | None) -> None:
        super().__init__()
        self.cache, self.window = cache, window
        self.is_sliding = window is not None
        self.keep = 0 if window is None else window - 1  # tokens before a query that it sees
        self.is_compileable = cache.limit is not None
        self.waiting = False
        self.table: MaybeTensor = None

    def __repr__(self) -> str:
        return f"KVLayer({self.cache.number}, window={self.window})"

    # Memory

    def lazy_initialization(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Takes memory for keys and values like these. scales: of the checkpoint, for fp8, one or one a head."""
        batch, heads, tokens, width = key_states.shape
        self._check(key_states, value_states)
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        number = self.cache.number
        form: Any = number if number in HEAD_DIMS and number != "none" else self.dtype
        room = self.cache.room
        self.ring = 0 if self.window is None else up(self.keep + SLACK + BLOCK, PAGE)
        length = PAGE if self.ring else room if room is not None else up(tokens + FIRST, BLOCK)
        pages = batch * self.ring // PAGE if self.ring else batch
        group = self.cache.group_size or (width // 2 if width >= 128 else width) if number == "int4" else None
        fixed = scales is not None and number == "fp8"
        made = kv_layout.new_cache(form, pages, heads, length, width, group=group, fixed=fixed, device=self.device)
        self.k_cache, self.v_cache, self.k_scale, self.v_scale = made
        self.groups = width // group if group else 1
        self.fixed: tuple[MaybeTensor, MaybeTensor] = (None, None)
        if scales is not None and fixed:
            for to, scale in zip(made[2:], scales):
                assert to is not None
                to.copy_(scale.detach().float().flatten().expand(heads))
            self.fixed = tuple(t[:, None, None] for t in made[2:] if t is not None)  # type: ignore[assignment]
        if self.ring:
            self._make_table(up(room if room is not None else tokens + FIRST, PAGE))
        self._join(batch)
        self.is_initialized = True
        if self.is_compileable and not torch.compiler.is_compiling():
            _fix(*self.stored(), self.table)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        number, width = self.cache.number, key_states.shape[3]
        wanted = DTYPES.get(number, key_states.dtype)
        known = HEAD_DIMS["none" if number in DTYPES else number]
        if value_states.shape != key_states.shape or width not in known:
            raise InputError(
                f"KVCache({number!r}): keys have {width} channels a head and values {value_states.shape[3]}; known are "
                f"the same of both, {_words(known)}"
            )
        group = self.cache.group_size or width
        if group != width and (2 * group != width or width < 128):  # the kernel has no halves of 64 channels
            raise InputError(
                f"KVCache('int4', group_size={group}): heads have {width} channels; use {width}"
                + (f" or {width // 2}" if width >= 128 else "")
            )
        if key_states.dtype != wanted:
            raise InputError(f"KVCache({number!r}): keys are {key_states.dtype}; load the model so, or use 'none'")

    def _join(self, batch: int) -> None:
        clocks = self.cache.clocks
        if self.device not in clocks:
            clocks[self.device] = Clock(batch, self.cache.room, self.device)
        self.clock = clocks[self.device]
        self.waiting = bool(self.clock.layers) and not self.clock.empty
        self.clock.layers.append(self)
        self.before, self.after = self.clock.before, self.clock.after

    def _make_table(self, tokens: int) -> None:
        """Which page holds which tokens: a row of pages is gone through again and again."""
        pages, rows = self.ring // PAGE, torch.arange(self.batch_size, dtype=torch.int32, device=self.device)
        turns = torch.arange(tokens // PAGE, dtype=torch.int32, device=self.device) % pages
        self.table = rows[:, None] * pages + turns

    def _grow(self, tokens: int) -> None:
        """Room for so many tokens of a growing cache."""
        if self.ring:
            assert self.table is not None
            if tokens > self.table.shape[1] * PAGE:
                self._make_table(up(2 * tokens, PAGE))
        elif tokens > self.k_cache.shape[2]:
            length = up(max(tokens, 2 * self.k_cache.shape[2]), BLOCK)
            rows = length if self.v_cache.shape[2] == self.k_cache.shape[2] else length // BLOCK
            self.k_cache, self.v_cache = _longer(self.k_cache, length), _longer(self.v_cache, rows)
            if self.k_scale is not None and self.v_scale is not None and self.fixed[0] is None:
                self.k_scale, self.v_scale = _longer(self.k_scale, length), _longer(self.v_scale, length)

    @property
    def held(self) -> int:
        """Tokens of a ring that are there for sure, of those that it was given last."""
        return self.ring - BLOCK

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, MaybeTensor, MaybeTensor]:
        """What lies in memory, as kernels take it."""
        return self.k_cache, self.v_cache, self.k_scale, self.v_scale

    def forget(self) -> None:
        """Gives its memory back."""
        if self.is_initialized:
            del self.k_cache, self.v_cache, self.k_scale, self.v_scale, self.clock, self.before, self.after
        self.is_initialized, self.table, self.waiting = False, None, False

    def select(self, rows: torch.Tensor, in_place: bool) -> None:
        """These sequences of the batch, in this order."""
        if not self.is_initialized:
            return
        per = self.ring // PAGE or 1
        pages = (rows.to(self.device)[:, None] * per + torch.arange(per, device=self.device)).flatten()
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            t = getattr(self, name)
            if t is None or (name.endswith("scale") and self.fixed[0] is not None):
                continue
            found = t.view(torch.uint8)[pages].view(t.dtype)
            t.view(torch.uint8).copy_(found.view(torch.uint8)) if in_place else setattr(self, name, found)
        if rows.numel() != self.batch_size:
            self.batch_size = rows.numel()
            if self.table is not None:
                self._make_table(self.table.shape[1] * PAGE)

    # A step

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values (B, H, n, D); returns them, or all of them decoded where another attention reads."""
        key_states, value_states = key_states.detach(), value_states.detach()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states, scales)
        tokens, packed = key_states.shape[2], self.cache.read_packed()
        if key_states.shape[0] != self.batch_size:
            raise InputError(f"a batch of {key_states.shape[0]} for a KVCache of {self.batch_size}; make another")
        self.clock.tick(self, tokens)
        if self.clock.room is None:
            self._grow(self.clock.count)
        k, v = key_states, value_states
        offset: int | torch.Tensor | None = None
        if self.clock.fresh:
            k, v, offset = self._rounded(k, 0), self._rounded(v, 1), 0
        elif self.ring and (tokens > FEW or not packed):
            old_k, old_v, offset = self._window(self.clock.before, -tokens, self.keep)
            k, v = torch.cat([old_k, self._rounded(k, 0)], 2), torch.cat([old_v, self._rounded(v, 1)], 2)
        self._append(key_states, value_states)
        if not packed and not self.clock.fresh:
            if not self.ring:
                k, v = self._first(self.clock.count if self.clock.room is None else self.clock.room)
            offset = 0  # a mask counts from the first key that is given
            self.cache.say_decoded()
        setattr(k, KV, (self, offset))
        return k, v

    def _append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        starts, table = self.clock.before, self.table
        if self.ring and k.shape[2] > self.held:
            starts = starts + (k.shape[2] - self.held)
            k, v = k[:, :, -self.held :], v[:, :, -self.held :]
        kv_append(k, v, self.k_cache, self.v_cache, self.k_scale, self.v_scale, starts, table)

    def _rounded(self, x: torch.Tensor, which: int) -> torch.Tensor:
        """Keys (0) or values (1) as the cache will give them back."""
        if not self.coded:
            return x
        fixed = self.fixed[which]
        codes, scale, zero = kv_layout.quantize(x, self.cache.number, fixed=fixed, groups=self.groups)
        if scale is None:
            assert fixed is not None
            return (codes.float() * fixed).to(x.dtype)
        wide = codes.float().unflatten(-1, (self.groups, -1))
        wide = wide if zero is None else wide - zero[..., None]
        return (wide * scale[..., None]).flatten(-2).to(x.dtype)

    @property
    def coded(self) -> bool:
        """Whether it holds codes, not keys."""
        return self.cache.number in ("fp8", "int8", "int4")

    def decoded(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor, MaybeTensor]:
        """Keys and values that `tokens` new ones, added last, can see; the first one's position; how many there are.

        The position is a tensor (B,), and may be negative, where the host does not know it; the number is None where
        it is that of the keys.
        """
        known = self.clock.known()
        if self.ring:
            return (*self._window(self.clock.after, 0, self.keep + tokens), None)
        if known is not None:
            return (*self._first(known), 0, None)
        assert self.clock.room is not None
        return (*self._first(self.clock.room), 0, self.clock.after)

    def _first(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first tokens of a dense cache, decoded."""
        if not self.coded:
            return self.k_cache[:, :, :tokens], self.v_cache[:, :, :tokens]
        k_scale, v_scale = (
            t if t is None or self.fixed[0] is not None else t[:, :, : up(tokens, BLOCK)]
            for t in (self.k_scale, self.v_scale)
        )
        keys, values = self.k_cache[:, :, : up(tokens, BLOCK)], self.v_cache[:, :, : -(-tokens // BLOCK)]
        k, v = self._decode(keys, k_scale, False), self._decode(values, v_scale, True)
        return k[:, :, :tokens], v[:, :, :tokens]

    def _decode(self, cache: torch.Tensor, scale: MaybeTensor, values: bool) -> torch.Tensor:
        return kv_layout.dequantize(cache, scale, values=values, dtype=torch.float32).to(self.dtype)

    def _window(
        self, end: torch.Tensor, more: int, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
        """The last tokens of a ring before position `end`, decoded, and the first one's position, as in `decoded`.

        more: what to add to the number of tokens to have `end`.
        """
        known = self.clock.known()
        keep = tokens if known is None else min(tokens, known + more)
        slots = (end[:1] - keep + torch.arange(keep, dtype=torch.int32, device=self.device)) % self.ring
        found = []
        for cache, scale, values in ((self.k_cache, self.k_scale, False), (self.v_cache, self.v_scale, True)):
            pages = self._decode(cache, scale, values).unflatten(0, (self.batch_size, -1))
            found.append(pages.transpose(1, 2).flatten(2, 3).index_select(2, slots))
        return found[0], found[1], end - keep if known is None else known + more - keep

    # What transformers asks

    def meet(self, module: torch.nn.Module) -> None:
        """The layer of the model that reads: its config says from now on who does."""
        config = getattr(module, "config", None)
        if config is not self.cache.config:
            self.cache.config = config

    def get_seq_length(self) -> Any:
        """Tokens that it has: an int, or where the cache is static an int64 tensor ()."""
        if not self.is_initialized:
            return 0
        if self.clock.room is None:
            return self.clock.count - (self.clock.step if self.waiting else 0)
        return (self.clock.before if self.waiting else self.clock.after)[0].long()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask is for, and the position of the first, before so many new ones are added."""
        if not self.is_initialized or self.clock.empty:
            return query_length, 0
        packed = self.cache.read_packed()
        if self.clock.room is not None and (packed or not self.ring):
            return (query_length if packed else self.clock.room), 0
        count = self.clock.tokens()
        kept = min(count, self.keep) if self.ring and not packed else count
        return kept + query_length, count - kept

    def get_max_length(self) -> int:
        return self.cache.limit or -1


def up(n: int, unit: int) -> int:
    """The next multiple."""
    return -(-n // unit) * unit


def _longer(t: torch.Tensor, length: int) -> torch.Tensor:
    """(B, H, n, ...) with room for more."""
    found = t.new_zeros((*t.shape[:2], length, *t.shape[3:]))
    found[:, :, : t.shape[2]].copy_(t)
    return found


def _fix(*tensors: MaybeTensor) -> None:
    """Tells torch.compile that these stay where they are, which CUDA graphs need."""
    for t in tensors:
        if t is not None:
            torch._dynamo.mark_static_address(t)


def _words(widths: Any) -> str:
    if isinstance(widths, range):
        return f"multiples of {widths.step} from {widths.start} to {widths[-1]}"
    return ", ".join(map(str, widths))
