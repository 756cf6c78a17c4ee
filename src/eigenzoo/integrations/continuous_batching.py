"""Generate with many models in one packed batch: transformers' continuous batching, with each request's own model.

    with ZooBatching(served) as batching:
        batching.add(tokens, "a", max_new_tokens=20)
        batching.add(tokens, "b", max_new_tokens=50, temperature=0.7)
        for output in batching: ...

The manager of transformers packs the tokens of all requests into one row. A hook before the model's forward pass tells
`Served.packed` which request each of them is of. Three settings are not left to the manager:

* Blocks of its cache are never shared between requests. They are found by tokens alone, so a request would read keys and values
  that another model has computed.
* Sampling is each request's own. By default the first request's is used for all.
* Batches are computed one after the other, without CUDA graphs: a graph that was recorded does not call hooks.

A request that loses its place in a full cache is computed once more by transformers, under its id. So a request ends when its last
output is delivered, and not when the scheduler lets it go.

Everything that depends on the inside of transformers is in this file, and named in `INSIDE`.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import ResourceError, UnsupportedError, UsageError, install
from eigenzoo.serve import Served
from eigenzoo.serve.slots import Ticket

try:
    import transformers
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching import cb_logits_processors as processors
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
    from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState
    from transformers.generation.continuous_batching.scheduler import FIFOScheduler
    from transformers.generation.logits_process import LogitsProcessorList
except ImportError as error:
    raise UnsupportedError(
        f"continuous batching cannot be imported ({error})",
        rule="it needs transformers 5.23",
        next_step=install("serve"),
    ) from error

TESTED = "5.23"
"""Version of transformers that the tests pass with."""

INSIDE: dict[type, tuple[str, ...]] = {
    ContinuousBatchingManager: (
        "_create_batch_processor",
        "add_request",
        "cancel_request",
        "get_result",
        "is_running",
        "register_result_handler",
        "start",
        "stop",
    ),
    OutputRouter: ("deliver", "deliver_batch", "fail_and_deliver"),
    FIFOScheduler: ("clear_cancelled_requests",),
    FutureRequestState: ("query_length", "state"),
    GenerationOutput: ("error", "is_finished"),
    RequestState: ("logit_processor_kwargs", "request_id"),
    processors.ContinuousBatchingLogitsProcessorList: ("_retrieve_processors_kwargs",),
    ContinuousBatchingConfig: ("allow_block_sharing", "per_request_processors", "use_async_batching", "use_cuda_graph"),
}
"""Parts of transformers' continuous batching that are used here, most of which it does not document."""

PAGE = 32
"""Tokens of a block of the cache."""

MAX_BATCH_TOKENS, MAX_REQUESTS = 2048, 256
"""Most tokens, and requests, of one forward pass."""

CACHE_TOKENS = 2**16
"""Tokens of all requests that the cache can hold."""

SAMPLED = {"temperature": 0.5, "top_k": 1, "top_p": 0.5}
"""Values with which transformers makes a processor of each. Every request gives its own."""


def check_inside() -> None:
    """Raise UnsupportedError that names a part of `INSIDE` which this version of transformers does not have."""
    for owner, names in INSIDE.items():
        for name in names:
            if not hasattr(owner, name) and name not in getattr(owner, "__dataclass_fields__", ()):
                raise _other_inside(f"{owner.__name__}.{name}")


def _other_inside(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"transformers {transformers.__version__} has no {name}",
        rule=f"eigenzoo's continuous batching uses it. Tested with transformers {TESTED}",
        next_step=install("serve"),
    )


class Greedy(processors.ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Leave only the first of the largest scores of the requests that do not sample."""

    supported_kwargs: dict[str, type] = {"greedy": bool}  # noqa: RUF012  (transformers' name and type)
    ignored_kwargs: tuple[str, ...] = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Default: sample."""
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Return which requests are greedy."""
        chosen = [request.state.logit_processor_kwargs.get("greedy", False) for request in requests_with_new_token]
        return torch.tensor(chosen, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores (requests, vocabulary)."""
        greedy = tensor_arg[: len(scores)].bool()[:, None]
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, keepdim=True), True)
        return scores.masked_fill(greedy & ~best, float("-inf"))


class _Router(OutputRouter):  # type: ignore[misc]
    """Delivers outputs, and then tells which requests have ended."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        super().__init__()
        self._ended = ended

    def deliver(self, output: Any) -> None:
        super().deliver(output)
        self._end([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        super().deliver_batch(outputs)
        self._end(outputs)

    def forget(self, request_id: str) -> None:
        """Drop the handler of a request, which only a finished one loses by itself."""
        with self._lock:
            self.result_handlers.pop(request_id, None)

    def _end(self, outputs: list[Any]) -> None:
        for output in outputs:
            if output.is_finished() or output.error is not None:
                self._ended(output.request_id)


class ZooBatching:
    """Continuous batching over the models of `Served`. A context: the thread that computes runs inside it.

    Args:
        served: the base with models attached: a causal language model of transformers.
        max_new_tokens: default of `add`.
        max_queue: most requests that wait or run; `add` raises ResourceError for more.
        cache_tokens: tokens of all running requests together that the cache holds. Memory: keys and values of as many tokens.

    Attributes:
        longest: most tokens of a prompt and its answer: what the model has positions for, and at most what the cache holds.

    Raises UsageError for a model of another kind, and UnsupportedError if transformers has another inside.
    """

    def __init__(
        self, served: Served, *, max_new_tokens: int = 1024, max_queue: int = 1024, cache_tokens: int = CACHE_TOKENS
    ) -> None:
        check_inside()
        model: Any = served.model
        config = getattr(model, "config", None)
        if not hasattr(model, "init_continuous_batching") or getattr(config, "is_encoder_decoder", False):
            kind = "is an encoder and a decoder" if config is not None else "is not of transformers"
            raise UsageError(
                f"{type(model).__name__} {kind}",
                rule="continuous batching is for causal language models of transformers",
                next_step="use served.generate or served.route",
            )
        self.served, self.max_new_tokens, self.max_queue = served, max_new_tokens, max_queue
        text = model.config.get_text_config()
        self._positions: int | None = getattr(text, "max_position_embeddings", None)
        self.longest = min(cache_tokens, self._positions or cache_tokens)
        self._vocabulary: int = text.vocab_size
        self._num_embeddings: int = model.get_input_embeddings().num_embeddings
        self._tickets: dict[str, Ticket] = {}
        self._lock = threading.Lock()
        self._entered = ExitStack()
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=True, num_return_sequences=1, max_new_tokens=max_new_tokens, **SAMPLED)
        for name, value in vars(GenerationConfig()).items():
            if name in UNSUPPORTED:
                setattr(config, name, value)
        self.manager = ContinuousBatchingManager(
            model=model,
            generation_config=_with_end(config),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=max(2, cache_tokens // PAGE),
                max_batch_tokens=MAX_BATCH_TOKENS,
                max_requests_per_batch=MAX_REQUESTS,
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                per_request_processors=True,
                max_queue_size=0,
            ),
        )
        self._router = _Router(self._release)
        self.manager.output_router = self._router
        self._add_greedy()

    def _add_greedy(self) -> None:
        """Put `Greedy` before the processors of transformers."""
        listed = self.manager.logit_processor
        missing = set(SAMPLED) - set(listed.supported_keys)
        if missing:
            raise _other_inside(f"{sorted(missing)[0]} of each request")
        listed.logits_processor = LogitsProcessorList([Greedy(), *listed.logits_processor])
        listed.tensors_required += 1
        listed._retrieve_processors_kwargs()

    def __enter__(self) -> ZooBatching:
        """Start the thread that computes."""
        manager, model = self.manager, self.served.model
        # The thread keeps it. A cancelled request has no output: that it has ended is seen here.
        manager.batch_processor = manager._create_batch_processor()
        scheduler = manager.batch_processor.scheduler
        clear = scheduler.clear_cancelled_requests

        def clear_cancelled_requests() -> list[Any]:
            states: list[Any] = clear()
            for state in states:
                self._release(state.request_id)
            if states:  # requests without a place wait for one to end; transformers counts only those that finish
                scheduler.block_new_requests = False
            return states

        scheduler.clear_cancelled_requests = clear_cancelled_requests
        before = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._entered.callback(before.remove)
        after = model.register_forward_hook(self._end, always_call=True)
        self._entered.callback(after.remove)
        self._routes = ExitStack()
        manager.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the thread. Requests that have not ended fail."""
        self.stop()

    def stop(self) -> None:
        """Stop the thread. Requests that have not ended fail. A second call does nothing."""
        if self.manager.is_running():
            self.manager.stop(block=True, hard_stop=True)
        self._entered.close()
        for request_id in list(self._tickets):
            self._release(request_id)

    @property
    def fault(self) -> Exception | None:
        """The error that ended the thread, or None."""
        fault: Exception | None = self.manager.background_thread_status.fatal_error
        return fault

    @property
    def is_accepting(self) -> bool:
        """Whether requests are accepted: not after a fault, and not while the thread stops."""
        return self.manager.background_thread_status.can_accept_new_requests() is None

    @property
    def num_requests(self) -> int:
        """Number of requests that wait or run, or whose last output is being delivered."""
        return len(self._tickets)

    def add(
        self,
        tokens: Sequence[int],
        model: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        streaming: bool = False,
        request_id: str | None = None,
        end: int | list[int] | None = None,
        receive: Callable[[Any], None] | None = None,
    ) -> str:
        """Add a request, and return its id. The model keeps its numbers until the request ends, whatever is removed meanwhile.

        Args:
            tokens: the prompt.
            model: a name of `served.names`, or `BASE`.
            temperature: 0 (the default) takes the best token.
            top_k, top_p: sample from the best tokens only. Default: from all.
            streaming: whether each token is delivered, not only the whole.
            request_id: the id. Default: a random one.
            end: tokens that end a generation. Default: the model's.
            receive: called with each output, on the event loop that runs where `add` is called. Default: iterate over the batching.

        Raises UsageError for an unknown model, for a prompt that is empty or too long, and for values and tokens out of range;
        ResourceError if too many requests wait.
        """
        wanted = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampling = sampling_of(temperature, top_k, top_p, self._vocabulary)
        if not len(tokens) or wanted < 1:
            raise UsageError("a prompt without tokens, or no tokens to generate", next_step="give at least one of each")
        self._check_fits(tokens, wanted)
        ticket = self.served.acquire(model)
        request_id = request_id or uuid.uuid4().hex
        with self._lock:
            if len(self._tickets) >= self.max_queue:
                ticket.release()
                raise ResourceError(
                    f"{len(self._tickets)} requests wait or run",
                    rule=f"at most {self.max_queue} may",
                    next_step="try again later",
                )
            if request_id in self._tickets:
                ticket.release()
                raise UsageError(f"request {request_id!r} is running already", next_step="choose another id")
            self._tickets[request_id] = ticket
        if receive is not None:
            self.manager.register_result_handler(request_id, receive)
        added = self.manager.add_request(
            list(tokens),
            request_id=request_id,
            max_new_tokens=wanted,
            streaming=streaming,
            eos_token_id=end,
            **sampling,
        )
        if added is None:
            self._release(request_id)
            raise ResourceError(
                "the thread that computes has ended",
                rule=str(self.fault or "it was stopped"),
                next_step="start it again",
            )
        return request_id

    def cancel(self, request_id: str) -> None:
        """End a request. Its place in the cache becomes free."""
        self.manager.cancel_request(request_id)

    def __iter__(self) -> Iterator[Any]:
        """Yield outputs (`GenerationOutput`) as they come, until all requests have ended."""
        while self.num_requests or not self.manager.output_router.output_queue.empty():
            output = self.manager.get_result(timeout=0.1)
            if output is not None:
                yield output
            elif not self.manager.is_running():
                return

    def generate(self, prompts: Sequence[Sequence[int]], models: Sequence[str], **options: Any) -> list[list[int]]:
        """Return the generated tokens of each prompt, with the options of `add`. Raises the error of a request that failed."""
        ids = [self.add(tokens, model, **options) for tokens, model in zip(prompts, models, strict=True)]
        found = {output.request_id: output for output in self if output.is_finished()}
        failed = [found[request_id] for request_id in ids if request_id in found and found[request_id].error]
        if failed or len(found) < len(ids):
            raise ResourceError(str(failed[0].error if failed else self.fault), where="a request")
        return [list(found[request_id].generated_tokens) for request_id in ids]

    def _check_fits(self, tokens: Sequence[int], wanted: int) -> None:
        """Raise UsageError for what would fail in the forward pass, with which the thread ends for all requests."""
        if len(tokens) + wanted > self.longest:
            by_model = self.longest == self._positions
            raise UsageError(
                f"a prompt of {len(tokens)} tokens and {wanted} more",
                rule=f"the {'model has' if by_model else 'cache holds'} {self.longest} {'positions' if by_model else 'tokens'}",
                next_step="ask for fewer tokens" if by_model else "ask for fewer tokens, or serve with a larger cache",
            )
        for extreme in (min(tokens), max(tokens)):
            if not 0 <= extreme < self._num_embeddings:
                raise UsageError(
                    f"token {extreme}",
                    rule=f"the base has the tokens 0 to {self._num_embeddings - 1}",
                    next_step="use the tokenizer of the base",
                )

    def _release(self, request_id: str) -> None:
        self._router.forget(request_id)
        with self._lock:
            ticket = self._tickets.pop(request_id, None)
        if ticket is not None:
            ticket.release()

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Route the tokens of the batch that the manager has packed."""
        if threading.current_thread() is not self.manager._generation_thread:
            return
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        tickets = [self._tickets[future.state.request_id] for future in batch]
        lengths = [future.query_length for future in batch]
        self._routes.enter_context(self.served.packed(tickets, lengths, kwargs.get("logits_to_keep")))

    def _end(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.current_thread() is self.manager._generation_thread:
            self._routes.close()


UNSUPPORTED = (
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "guidance_scale",
    "stop_strings",
)
"""Settings of a generation config that would be those of all requests, or are dropped with a warning by transformers."""


def sampling_of(temperature: float | None, top_k: int | None, top_p: float | None, vocabulary: int) -> dict[str, Any]:
    """Return what the processors get for a request. Raises UsageError for values out of range."""
    heat = 1.0 if temperature is None else float(temperature)
    nucleus = 1.0 if top_p is None else float(top_p)
    if not 0 <= heat <= 100 or not 0 < nucleus <= 1 or (top_k is not None and top_k < 0):
        raise UsageError(
            f"temperature {temperature}, top_p {top_p}, top_k {top_k}",
            rule="a temperature is at least 0 (greedy), top_p above 0 and at most 1, top_k at least 1 (0: all)",
            next_step="choose values in these ranges",
        )
    return {
        "greedy": heat == 0,
        "temperature": heat or 1.0,
        "top_k": min(top_k or vocabulary, vocabulary),
        "top_p": nucleus,
    }


def _with_end(config: GenerationConfig) -> GenerationConfig:
    """Return a config with a token that ends generations; −1, which no token is, if the model has none."""
    if config.eos_token_id is None:
        config.eos_token_id = -1
    return config
