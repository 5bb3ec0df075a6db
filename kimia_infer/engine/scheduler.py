"""One thread that computes for all requests: it admits, encodes, reads prompts, decodes, speaks.

Requests wait in a queue. As many as there are slots are admitted, in order; encoders take the
sounds that wait together. Prompts are read in pieces between the steps of those that run, chunks
of speech that wait are computed together, and nobody waits to be grouped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor

from kimia_infer.engine.decode import Decoder
from kimia_infer.engine.generation import DecodeInput, Generation, Progress, Step, Task
from kimia_infer.engine.speech import Speech, Synthesizer
from kimia_infer.models.kimi_audio.detokenizer import Detokenizer
from kimia_infer.utils.errors import RequestError, ServiceBusy, as_request_error, is_out_of_memory

log = logging.getLogger(__name__)

POLL_INTERVAL = 8
"""Steps between polls where steps are recorded."""

FIRST_SPEECH_INTERVAL = 2
"""Steps between polls while the first chunk is synthesized, so that it is not kept waiting."""

ENCODED_TOGETHER = 8
"""Chats that are encoded together on an accelerator.

On a CPU only short sounds would gain, and the first caller would wait for all of them.
"""

LONGEST_QUEUE = 256
"""Requests that may wait for a slot."""

Encode = Callable[[Sequence[Any]], list[DecodeInput]]
Result = TypeVar("Result")


class Scheduler:
    """The queue, and the thread that owns the device.

    ``encode`` makes the prompts of chats. The thread starts with the first request. Requests that
    fail leave the others as they are.
    """

    def __init__(self, decoder: Decoder, detokenizer: Detokenizer | None, encode: Encode):
        self.decoder, self.encode = decoder, encode
        # Without recorded steps a poll costs nothing.
        self.poll_interval = POLL_INTERVAL if decoder.graphs.captures else 1
        self._encoded_together = ENCODED_TOGETHER if decoder.model.device.type != "cpu" else 1
        self._synthesizer = None if detokenizer is None else Synthesizer(detokenizer)
        self._changed = threading.Condition()
        self._queue: deque[Task] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stopped = ""  # why, once it is
        self._thread: threading.Thread | None = None
        self._tasks: list[Task] = []  # those that have a slot
        self._unread: deque[tuple[Task, DecodeInput]] = deque()
        self._reading: tuple[Task, Generation, Iterator[None]] | None = None
        self._running: dict[Generation, Task] = {}
        self._task_seconds = 1.0

    @property
    def slots(self) -> int:
        return self.decoder.slots

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def taken(self) -> int:
        """Requests that have a slot."""
        return len(self._tasks)

    @property
    def stopped(self) -> str:
        """Why no more requests are taken; empty while they are."""
        return self._stopped

    def submit(self, task: Task) -> None:
        """Put a request in the queue; what comes of it is in its events.

        Raises RequestError if it is larger than the key/value cache, ServiceBusy if the queue is
        full, and RuntimeError after the end of the thread.
        """
        places = self.decoder.room.spans.places
        if task.positions > places:
            raise RequestError(
                f"max_new_tokens: the prompt needs {task.length} positions and the answer up to "
                f"{task.max_steps}, but the key/value cache has {places}; ask for a shorter "
                "answer, or send less audio, text or history"
            )
        with self._changed:
            self._start()
            if len(self._queue) >= LONGEST_QUEUE:
                seconds = self._task_seconds * (len(self._queue) + 1) / self.slots
                raise ServiceBusy(len(self._queue), round(1000 * seconds))
            self._queue.append(task)
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns or raises, computed by the thread between two turns.

        Requests wait for it. Raises RuntimeError after the end of the thread.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Result] = Future()
        with self._changed:
            self._start()
            self._calls.append((future, function))
            self._changed.notify()
        try:
            return future.result()
        finally:
            del future, function  # an error refers to this frame

    def _start(self) -> None:
        """Begin the thread, unless it has begun. RuntimeError if it has ended."""
        if self._stopped:
            raise RuntimeError(self._stopped)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
            self._thread.start()

    def abandon(self, task: Task) -> None:
        """Nobody waits for this request any more: free what it holds, within a step."""
        task.abandoned = True
        with self._changed:
            self._changed.notify()

    def stop(self) -> None:
        """End the thread; requests that are not complete fail."""
        with self._changed:
            self._stopped = self._stopped or "the engine was stopped"
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        try:
            while self._has_work():
                try:
                    self._turn()
                except Exception as error:
                    log.exception("The engine failed; all that it was computing has ended")
                    self._fail_running(error)
        except BaseException as error:
            self._stopped = f"the engine has stopped, as the device failed: {error}"
            raise
        finally:
            with self._changed:
                ends = [task.end for task in (*self._tasks, *self._queue)]
                ends += [future.set_exception for future, _ in self._calls]
                for held in (self._tasks, self._queue, self._calls):
                    held.clear()
            for end in ends:
                end(RuntimeError(self._stopped))

    def _has_work(self) -> bool:
        """Wait for a request; False once the engine is to stop."""
        with self._changed:
            while not (self._queue or self._tasks or self._calls or self._stopped):
                self._changed.wait()
            return not self._stopped

    def _turn(self) -> None:
        """One pass over all stages; requests that have ended meanwhile are dropped before each."""
        with self._changed:
            waiting = list(self._queue)
        self._drop_ended(waiting)
        for stage in (self._call_next, self._admit, self._encode_next, self._read_next,
                      self._speak, self._decode):  # fmt: skip
            self._drop_ended(self._tasks)
            stage()

    def _drop_ended(self, tasks: Sequence[Task]) -> None:
        """Free what belongs to requests among ``tasks`` that are abandoned, cancelled or late."""
        for task in list(tasks):
            try:
                task.check()
            except Exception as error:
                self._fail(task, error)
            if task.abandoned:
                self._fail(task, RuntimeError("the request was abandoned"))

    def _call_next(self) -> None:
        """Compute the next that :meth:`call` waits for."""
        if not self._calls:
            return
        future, function = self._calls.popleft()
        try:
            with torch.inference_mode():
                future.set_result(function())
        except BaseException as error:  # somebody waits
            future.set_exception(error)
        del future, function  # an error refers to this frame

    def _admit(self) -> None:
        with self._changed:
            while self._queue and len(self._tasks) < self.slots:
                task = self._queue.popleft()
                task.finish_stage("queue")
                task.admitted = time.monotonic()
                self._tasks.append(task)

    def _encode_next(self) -> None:
        """Make prompts of the chats that wait, so many at once."""
        waiting = [task for task in self._tasks if not task.encoded]
        chosen = waiting[: self._encoded_together]
        if not chosen:
            return
        try:
            prompts = self.encode([task.chat for task in chosen])
        except Exception as error:
            if len(chosen) == 1:
                self._fail(chosen[0], error)
                return
            log.warning("%d chats could not be encoded together (%s)", len(chosen), error)
            prompts = []  # one by one, so that whoever is not to blame goes on
        for index, task in enumerate(chosen):
            try:
                prompt = prompts[index] if prompts else self.encode([task.chat])[0]
            except Exception as error:
                self._fail(task, error)
                continue
            task.encoded = True
            task.finish_stage("encoders")
            self._unread.append((task, prompt))

    def _read_next(self) -> None:
        """Read a piece of the prompt that is next."""
        if self._reading is not None:
            task = self._reading[0]
        elif self._unread and self.decoder.room.make(self._unread[0][0]):
            task = self._unread[0][0]
        else:
            return
        try:
            if self._reading is None:
                self._reading = self._begin(*self._unread.popleft())
            _, generation, pieces = self._reading
            if next(pieces, "end") == "end":
                self._running[generation] = task
                self._reading = None
        except Exception as error:
            self._fail(task, error)

    def _begin(self, task: Task, prompt: DecodeInput) -> tuple[Task, Generation, Iterator[None]]:
        """Take the slot of a generation; its prompt is still to be read."""
        task.generation = generation = Generation(
            self.decoder, prompt, task.output_type, task.max_steps, task.sampling,
            task.randomness, self.poll_interval,
        )  # fmt: skip
        if task.speech is not None:
            generation.poll_by(generation.delay + task.speech.missing())
        return task, generation, self.decoder.begin(generation)

    def _decode(self) -> None:
        """Launch steps of all that run, and pass on what earlier ones have brought."""
        if not self._running:
            return
        try:
            for generation, progress in self.decoder.step():
                self._pass_on(self._running[generation], generation, progress)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # The last one to come goes, so that the others have room.
            last = next(g for g in reversed(self.decoder.room.starts) if g in self._running)
            self._fail(self._running[last], error)

    def _pass_on(self, task: Task, generation: Generation, progress: Progress) -> None:
        if generation.broken:
            self._fail(task, FloatingPointError("the logits of this answer are not finite"))
            return
        if "prefill" not in task.seconds:
            task.finish_stage("prefill")
        ids, guard, finished = progress.text_ids, task.guard, progress.finished
        if guard is not None:
            ids = guard.push(ids) + (guard.finish() if finished else [])
            finished = finished or task.repeats
        task.events.put(Step(progress.steps, ids, finished))
        if task.speech is not None:
            task.speech.feed(task.codes_of(progress.audio_ids))
            self._plan_poll(task.speech, generation, progress)
        if finished:
            self._release(task)
            task.finish_stage("decode")
            if task.speech is not None:
                task.speech.finish()
            self._end_if_done(task)

    def _plan_poll(self, speech: Speech, generation: Generation, progress: Progress) -> None:
        """Poll exactly when a chunk of speech can be complete."""
        known = max(progress.steps, generation.delay)
        ahead = max(0, generation.launched - known)
        generation.poll_by(known + speech.missing(ahead))
        if speech.busy and not speech.heard:
            generation.poll_by(generation.launched + FIRST_SPEECH_INTERVAL)

    def _speak(self) -> None:
        synthesizer = self._synthesizer
        if synthesizer is None:
            return
        speeches = {task.speech: task for task in self._tasks if task.speech is not None}
        for speech, error in synthesizer.start(speeches).items():
            self._fail(speeches[speech], error)
        # With nothing else to do, wait for the sound, but not so long that a newcomer would notice.
        idle = not (self._running or self._reading or self._unread)
        if synthesizer.awaited and idle:
            with self._changed:
                self._changed.wait(0.001)
        for speech, wave in synthesizer.finished():
            if speech in speeches:
                self._pass_on_wave(speeches[speech], wave)

    def _pass_on_wave(self, task: Task, wave: Tensor) -> None:
        if len(wave):
            task.events.put(wave)
        self._end_if_done(task)

    def _end_if_done(self, task: Task) -> None:
        """End a task whose generation is finished, once all its speech is made."""
        if task.generation in self._running or (task.speech is not None and task.speech.busy):
            return
        if task.speech is not None:
            task.speech.close()
            task.seconds["detokenizer"] = task.speech.seconds
        self._tasks.remove(task)
        taken = time.monotonic() - task.admitted
        self._task_seconds += 0.1 * (taken - self._task_seconds)
        task.end()

    def _release(self, task: Task) -> None:
        """Free the slot of the generation of a task, if it has one."""
        generation = task.generation
        if self._reading is not None and self._reading[0] is task:
            self._reading = None
        elif generation not in self._running:
            return
        assert generation is not None, "it has begun"
        self._running.pop(generation, None)
        self.decoder.release(generation)

    def _fail(self, task: Task, error: BaseException) -> None:
        """End a task with an error, and free all that it holds."""
        if task.ended:
            return
        self._unread = deque(pair for pair in self._unread if pair[0] is not task)
        with self._changed:
            if task in self._queue:
                self._queue.remove(task)
        if task in self._tasks:
            self._tasks.remove(task)
        try:
            self._release(task)
            if task.speech is not None:
                task.speech.close()
        finally:
            task.end(as_request_error(error))

    def _fail_running(self, error: BaseException) -> None:
        """End all tasks that have a slot, each with an error of its own.

        Raises what the device says if it cannot even free them.
        """
        failed, self._tasks = self._tasks, []
        self._unread.clear()
        self._running.clear()
        self._reading = None
        try:
            self.decoder.reset()
        finally:
            for task in failed:
                if task.speech is not None:
                    task.speech.close()
                task.end(_own(error))


def _own(error: BaseException) -> BaseException:
    """An error for one of several callers, who each add their frames to its traceback."""
    if is_out_of_memory(error):
        return as_request_error(error)
    own = RuntimeError(f"the engine failed, and with it this request: {error}")
    own.__cause__ = error
    return own
