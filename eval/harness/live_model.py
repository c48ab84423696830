"""The harness's HFLM around a model that is already loaded. Imports the harness, which takes seconds: import it late."""

import contextlib
import sys
import time

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from llmkd.console import first_process, info
from llmkd.data.encoding.template_process import rendered
from llmkd.errors import Stopped, UserError
from llmkd.process.machine_errors import is_out_of_memory

from .samples import request_key
from .shared_prefix import SharedPrefix


class LiveModel(HFLM):
    """HFLM on `model` as it is: embeddings are not resized, and weights not tied again.

    To the harness it is one process. Each process of the launch answers the requests of its share of the documents and gets the
    others' answers, so that all see every document in order: few-shot examples and sums are those of a single process.

    `truncated` holds the requests (as `request_key` gives them) that were longer than the model's context, so that their beginning was dropped.
    `prefix` is what all requests of the present call begin with, if the model has read that once for all of them.
    """

    def __init__(self, model, tokenizer, batch_size, accelerator, stop):
        with _weights_as_they_are(model):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
        self.launch, self.stop, self.truncated, self.no_system = accelerator, stop, set(), False
        self.prefix: SharedPrefix | None = None

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._shared(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self._shared(super().loglikelihood_rolling, requests)

    def generate_until(self, requests, disable_tqdm=False):
        return self._shared(self._generate, requests)

    def _generate(self, requests, disable_tqdm=False):
        for context, options in (request.args for request in requests):
            wanted = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if wanted >= self.max_length:
                raise UserError(f"up to {wanted} tokens are to be generated, and the model's context holds {self.max_length}")
            if len(self.tok_encode(context)) > self.max_length - wanted:
                self.truncated.add(request_key((context, options)))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **options):
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(f"an answer has {longest} tokens, and the model's context holds {self.max_length}")
        for words, context, continuation in requests:
            if words is not None and len(context) + len(continuation) > self.max_length + 1:  # parts of a rolling text come without words
                self.truncated.add(request_key(words))
        total = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        self.prefix = SharedPrefix.of(self.model, [context for _, context, _ in requests], total, self.max_length + 1)
        if self.prefix:
            read = len(self.prefix.tokens)
            requests = [(words, context[read:], continuation) for words, context, continuation in requests]
        try:
            return super()._loglikelihood_tokens(requests, **options)
        finally:
            self.prefix = None

    def _model_call(self, inps, attn_mask=None, labels=None):
        return self.prefix.logits(self.model, inps) if self.prefix else super()._model_call(inps, attn_mask, labels)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """Rendered as in training: in a separate process, with a fixed date. `no_system` is set if the template takes no system message."""
        if not add_generation_prompt:  # the harness writes the beginning of the answer itself
            return super().apply_chat_template(chat_history, add_generation_prompt)
        template, tokens = self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map
        try:
            return rendered(template, tokens, chat_history)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            self.no_system = True
            return rendered(template, tokens, rest)

    def get_model_info(self):
        """Left to llmkd's record. The harness would ask the hub for a model with this object's name."""
        return {}

    def _shared(self, answer, requests):
        ranks, rank = self.launch.num_processes, self.launch.process_index
        share = [i for i, request in enumerate(requests) if (request.doc_id or 0) % ranks == rank]
        answers, problem = [], None
        with _Progress(len(share), self.stop if ranks == 1 else None) as progress:
            self.set_cache_hook(progress)
            try:
                answers = answer([requests[i] for i in share], disable_tqdm=True) if share else []
            except Exception as error:
                problem = _in_words(error)
                if problem is None and ranks == 1:
                    raise
                problem = problem or f"{type(error).__name__}: {error}"  # raised later, since the other processes wait for this one
        if ranks > 1:
            from accelerate.utils import gather_object

            parts = gather_object([(share, answers, self.truncated, problem)])
        else:
            parts = [(share, answers, self.truncated, problem)]
        if problem := next((part[3] for part in parts if part[3]), None):
            raise UserError(problem)
        self.truncated = set().union(*(part[2] for part in parts))
        found = {i: answer for share, answers, *_ in parts for i, answer in zip(share, answers, strict=True)}
        return [found[i] for i in range(len(requests))]


@contextlib.contextmanager
def _weights_as_they_are(model):
    """Keeps HFLM from calling `tie_weights`: loading has done it, and with an adapted head or embedding it might undo what was loaded."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


def _in_words(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    return "out of memory; give a smaller --batch_size" if is_out_of_memory(error) else None


class _Progress:
    """A cache hook, which HFLM calls for every answer: it shows a progress bar, or prints lines if the console is a file, and stops on a signal."""

    def __init__(self, total: int, stop):
        from tqdm import tqdm

        self.stop, self.total, self.done, self.said = stop, total, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="request", leave=False, disable=None if first_process() else True, file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add_partial(self, *_) -> None:
        self.bar.update()
        self.done += 1
        if self.stop and self.stop():
            raise Stopped("stopped by a signal")
        if self.bar.disable and time.monotonic() - self.said > 30:
            self.said = time.monotonic()
            info(f"  {self.done} of {self.total} requests")
