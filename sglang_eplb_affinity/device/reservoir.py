"""A uniform sample of the tokens of a window, decided on the host."""

from __future__ import annotations

import numpy as np

_CHUNK = 1024
_NONE = np.zeros(0, dtype=np.int64)


class TokenReservoir:
    """Uniform sample without replacement of a stream of tokens (algorithm L of Li, 1994: reservoir with skips).

    The host knows how many tokens a pass has, so the choice costs the device nothing, is the same for all layers, and
    gives every token of the window the same chance however long the window is. Once the sample is full the next tokens
    to be taken are drawn ahead, so that a pass that contributes none costs one comparison. ``offer`` runs in the thread
    that launches forward passes, where a microsecond is one of the pass: usual passes take few numpy calls.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._random = np.random.default_rng(seed)
        self._owner = np.zeros(capacity, dtype=np.int64)
        self._order = np.arange(capacity)
        self._order.flags.writeable = False  # parts of it are handed out
        self._log_w = 0.0
        self._last = capacity - 1  # position of the last token drawn so far
        self._positions, self._slots = _NONE, _NONE
        self._draw()
        self._first_draw = self._log_w, self._last, self._positions, self._slots
        self._first_state = self._random.bit_generator.state
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the same draws. Cheap, since it happens between two forward passes."""
        self._random.bit_generator.state = self._first_state
        self._log_w, self._last, self._positions, self._slots = self._first_draw
        self._next = int(self._positions[0])
        self.seen = 0

    def offer(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [taken]: tokens of the pass that enter the sample, int64 [taken]: the slot that each takes).

        Read-only views, valid until the next call.
        """
        begin, end = self.seen, self.seen + num_tokens
        self.seen = end
        if end <= self._capacity:
            return self._order[:num_tokens], self._order[begin:end]
        if begin < self._capacity:
            first = self._order[begin:]
            tokens, slots = [first - begin], [first]
        elif end <= self._next:
            return _NONE, _NONE
        else:
            tokens, slots = [], []
        while self._next < end:
            count = int(self._positions.searchsorted(end))
            tokens.append(self._positions[:count] - begin)
            slots.append(self._slots[:count])
            self._positions, self._slots = self._positions[count:], self._slots[count:]
            if not len(self._positions):
                self._draw()
            self._next = int(self._positions[0])
        token, slot = (tokens[0], slots[0]) if len(tokens) == 1 else (np.concatenate(tokens), np.concatenate(slots))
        if len(slot) == 1:
            return token, slot
        # Of two tokens of one pass that draw the same slot the later one stays, as if they had come one by one.
        order = self._order[: len(slot)] if len(slot) <= self._capacity else np.arange(len(slot))
        self._owner[slot] = order
        last = self._owner[slot] == order
        return (token, slot) if last.all() else (token[last], slot[last])

    def _draw(self) -> None:
        """Positions and slots of the next tokens to be taken, in rising order."""
        w = self._log_w + np.cumsum(np.log(1 - self._random.random(_CHUNK))) / self._capacity
        skip = np.floor(np.log(1 - self._random.random(_CHUNK)) / np.log1p(-np.exp(w)))
        # Beyond 2**40 tokens nothing is taken any more; a window ends long before.
        self._positions = self._last + np.cumsum(np.minimum(skip, 2.0**40).astype(np.int64) + 1)
        self._slots = self._random.integers(0, self._capacity, _CHUNK)
        self._log_w, self._last = float(w[-1]), int(self._positions[-1])
