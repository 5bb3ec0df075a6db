"""One session: a client's events in order, and what they lead to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from kimia_infer.serving.openai.errors import ApiError, unsupported
from kimia_infer.serving.openai.service import Service
from kimia_infer.serving.openai.voices import Voice, read_voice
from kimia_infer.serving.realtime import client_events as events
from kimia_infer.serving.realtime.config import Modality, SessionConfig, response_config, updated
from kimia_infer.serving.realtime.conversation import Conversation, Item, Part, new_id, parse_item
from kimia_infer.serving.realtime.history import cut_to_heard
from kimia_infer.serving.realtime.outbox import Outbox, SessionOver
from kimia_infer.serving.realtime.response import Options, Response
from kimia_infer.serving.realtime.schema import as_failure, decode_sound, milliseconds, samples_in
from kimia_infer.serving.realtime.transcription import Transcriptions, with_transcriber
from kimia_infer.serving.realtime.turns import SpeechStarted, SpeechStopped, Turns
from kimia_infer.serving.realtime.voice_activity import VoiceActivity


def default_config(service: Service, model: str) -> SessionConfig:
    """How sessions begin: with speech if the server has it, and with turns by voice activity."""
    speaks = service.model.detokenizer is not None
    modalities: tuple[Modality] = ("audio",) if speaks else ("text",)
    return SessionConfig(type="realtime", model=model, output_modalities=modalities)


def changed(service: Service, config: SessionConfig, change: dict[str, Any]) -> SessionConfig:
    """``config`` with what a client sets; raises ApiError for what this server does not have."""
    config = updated(config, change)
    service.check_model(config.model, "session.model")
    output = config.audio.output
    voice = read_voice(service, output.voice, "session.audio.output.voice")
    check_modality(service, config.output_modalities[0], "session", voice)
    if output.speed != 1 and not voice.speaker:
        asked = (change.get("audio") or {}).get("output") or {}
        if "speed" in asked:
            advice = "the model speaks at 1.0; choose a voice of Kokoro"
            raise unsupported("session.audio.output.speed", advice)
        own = {"type": config.type, "audio": {"output": {"speed": 1.0}}}
        config = updated(config, own)  # the speed was that of the voice before
    return with_transcriber(service, config)


def check_modality(service: Service, modality: Modality, where: str, voice: Voice) -> None:
    """Raise ApiError for speech from a server that was started without, unless Kokoro speaks."""
    if modality == "audio" and service.model.detokenizer is None and not voice.speaker:
        advice = "this server writes only; send ['text']"
        if service.model.kokoro is not None:
            advice += ", or choose a voice of Kokoro"
        raise unsupported(f"{where}.output_modalities", advice)


class Session:
    """The state of one connection, from ``session.created`` to its end.

    Client events are handled one after another. Beside that run at most one response, the
    transcriptions, and the clock of the idle time; all are tasks of one group, which ends with
    the connection.
    """

    def __init__(
        self, service: Service, websocket: WebSocket, activity: VoiceActivity, config: SessionConfig
    ):
        self.id = new_id("sess")
        self._service, self._websocket, self._activity = service, websocket, activity
        self._config = config
        self._conversation = Conversation()
        self._outbox = Outbox(websocket)
        self._send = self._outbox.send
        self._transcriptions = Transcriptions(service, self._send)
        self._response: Response | None = None
        self._speech_item: str | None = None
        self._idle: asyncio.Task[None] | None = None
        self._input = asyncio.Lock()
        self._expires = time.time() + service.settings.session_seconds

    async def run(self) -> None:
        """Serve the client until either side ends it."""
        try:
            self._turns = Turns(self._activity, await self._activity.stream())
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._expire())
                await self._send("session.created", session=self._described())
                await self._read()
        except* SessionOver as group:
            over = group.exceptions[0]
            while isinstance(over, ExceptionGroup):
                over = over.exceptions[0]
            assert isinstance(over, SessionOver)
            if over.code is not None:
                await self._close(over.code, over.reason)

    async def _close(self, code: int, reason: str) -> None:
        try:
            async with asyncio.timeout(1):
                await self._websocket.close(code, reason)
        except (TimeoutError, RuntimeError, OSError, WebSocketDisconnect):
            return  # nobody is there to be told

    async def _expire(self) -> None:
        await asyncio.sleep(self._service.settings.session_seconds)
        limit = self._service.settings.session_seconds
        await self._end("session_expired", f"the session has lasted {limit:g} s, the most here")

    async def _end(self, code: str, text: str) -> NoReturn:
        await self._send_error(ApiError(400, text, code=code))
        raise SessionOver(1000, code)

    async def _read(self) -> None:
        """Handle events until the client is gone."""
        idle = self._service.settings.session_idle_seconds
        while True:
            try:
                async with asyncio.timeout(idle):
                    message = await self._websocket.receive()
            except TimeoutError:
                await self._end("session_idle", f"the client sent nothing for {idle:g} s")
            if message["type"] == "websocket.disconnect":
                raise SessionOver(None, "the client hung up")
            await self._handle(message.get("text"))

    async def _handle(self, text: str | None) -> None:
        """Handle one frame; whatever is wrong with it is answered, and the session goes on."""
        value: dict[str, Any] = {}
        try:
            if text is None:
                advice = "binary frames are not read; send JSON as text"
                raise ApiError(400, advice, code="invalid_json")
            value = events.decode_message(text)
            event = events.parse_event(value)
            await self._handlers()[type(event)](event)
        except SessionOver:
            raise
        except Exception as error:
            await self._send_error(as_failure(error), value.get("event_id"))

    async def _reported(self, work: Awaitable[None]) -> None:
        """Do ``work`` that no event of the client asked for; what goes wrong is sent."""
        try:
            await work
        except SessionOver:
            raise
        except Exception as error:
            await self._send_error(as_failure(error))

    async def _send_error(self, error: ApiError, event_id: Any = None) -> None:
        known = event_id[:512] if isinstance(event_id, str) else None
        await self._send("error", error=error.error | {"event_id": known})

    def _handlers(self) -> dict[type, Callable[[Any], Awaitable[None]]]:
        return {
            events.SessionUpdate: self._update,
            events.AppendAudio: self._append,
            events.CommitAudio: self._commit,
            events.ClearAudio: self._clear,
            events.CreateItem: self._create_item,
            events.DeleteItem: self._delete_item,
            events.RetrieveItem: self._retrieve_item,
            events.TruncateItem: self._truncate_item,
            events.CreateResponse: self._create_response,
            events.CancelResponse: self._cancel_response,
        }

    def _described(self) -> dict[str, Any]:
        identity = {"id": self.id, "object": "realtime.session", "expires_at": int(self._expires)}
        return identity | self._config.model_dump()

    async def _update(self, event: events.SessionUpdate) -> None:
        config = changed(self._service, self._config, event.session)
        before, after = (c.audio.input.turn_detection for c in (self._config, config))
        if (before is None) != (after is None):
            self._turns.restart()
            self._speech_item = None
        self._config = config
        self._stop_idle()
        await self._send("session.updated", session=self._described())

    async def _append(self, event: events.AppendAudio) -> None:
        sound = decode_sound(event.audio, "audio")
        vad = self._config.audio.input.turn_detection
        async with self._input:
            async for change in self._turns.append(sound, vad):
                if isinstance(change, SpeechStarted):
                    await self._speech_started(change)
                else:
                    await self._reported(self._speech_stopped(change))

    async def _speech_started(self, change: SpeechStarted) -> None:
        vad = self._config.audio.input.turn_detection
        self._stop_idle()
        self._speech_item = new_id("item")
        await self._send(
            "input_audio_buffer.speech_started",
            audio_start_ms=milliseconds(change.begin),
            item_id=self._speech_item,
        )
        response = self._response
        if vad and vad.interrupt_response and response and response.in_conversation:
            response.cancel("turn_detected")

    async def _speech_stopped(self, change: SpeechStopped) -> None:
        item = self._speech_item or new_id("item")
        self._speech_item = None
        end = milliseconds(change.end)
        await self._send("input_audio_buffer.speech_stopped", audio_end_ms=end, item_id=item)
        await self._add_turn(change.sound, item)
        vad = self._config.audio.input.turn_detection
        if vad is not None and vad.create_response:
            await self._respond({})

    async def _commit(self, event: events.CommitAudio) -> None:
        async with self._input:
            sound = self._turns.commit()
            item, self._speech_item = self._speech_item or new_id("item"), None
            await self._add_turn(sound, item)

    async def _add_turn(self, sound: bytes, item_id: str) -> None:
        """Make the user's sound an item."""
        self._stop_idle()
        item = Item("user", [Part("input_audio", None, sound)], item_id)
        before = self._conversation.add(item)
        await self._send("input_audio_buffer.committed", previous_item_id=before, item_id=item.id)
        await self._announce(item, before)
        transcription = self._config.audio.input.transcription
        if transcription is not None:
            self._group.create_task(self._transcriptions.transcribe(item, transcription))

    async def _announce(self, item: Item, before: str | None) -> None:
        shown = item.described()
        for name in ("added", "done"):
            await self._send(f"conversation.item.{name}", previous_item_id=before, item=shown)

    async def _clear(self, event: events.ClearAudio) -> None:
        async with self._input:
            self._turns.clear()
            self._speech_item = None
            await self._send("input_audio_buffer.cleared")

    async def _create_item(self, event: events.CreateItem) -> None:
        item = parse_item(event.item)
        await self._announce(item, self._conversation.add(item, event.previous_item_id))

    async def _delete_item(self, event: events.DeleteItem) -> None:
        self._conversation.delete(event.item_id)
        await self._send("conversation.item.deleted", item_id=event.item_id)

    async def _retrieve_item(self, event: events.RetrieveItem) -> None:
        item = self._conversation.find(event.item_id)
        await self._send("conversation.item.retrieved", item=item.described(with_sound=True))

    async def _truncate_item(self, event: events.TruncateItem) -> None:
        item = self._conversation.find(event.item_id)
        response = self._response
        if response is not None and response.item is item:
            if not response.ending:
                text = "item_id: it is still being spoken; cancel the response first"
                raise ApiError(400, text, "item_id", "item_in_progress")
            await response.ended.wait()
        part = item.parts[event.content_index] if event.content_index < len(item.parts) else None
        if part is None or part.kind != "output_audio":
            name = "item_id" if item.role != "assistant" else "content_index"
            text = f"{name}: only speech of the assistant can be truncated"
            raise ApiError(400, text, name, "invalid_value")
        samples = samples_in(event.audio_end_ms)
        if samples > part.samples:
            text = f"audio_end_ms: the audio has {milliseconds(part.samples)} ms only"
            raise ApiError(400, text, "audio_end_ms", "invalid_value")
        cut_to_heard(part, samples, whole=True)
        item.status = "incomplete"
        place = event.model_dump(include={"item_id", "content_index", "audio_end_ms"})
        await self._send("conversation.item.truncated", **place)

    async def _create_response(self, event: events.CreateResponse) -> None:
        await self._respond(event.response)

    async def _respond(self, asked: Any) -> None:
        """Begin a response; raises ApiError while there is another one."""
        config, own = self._config, response_config(asked)
        current = self._response
        if current is not None and not current.ended.is_set():
            if not current.ending:
                raise ApiError(
                    400,
                    f"the response {current.id} is in progress; cancel it, or wait for its end",
                    code="conversation_already_has_active_response",
                )
            await current.ended.wait()
        items = [*self._conversation.items]
        if own.input is not None:
            items = [self._input_item(value, index) for index, value in enumerate(own.input)]
        name = own.audio.output.voice or config.audio.output.voice
        voice = read_voice(self._service, name, "response.audio.output.voice")
        tokens = own.max_output_tokens or config.max_output_tokens
        modality = (own.output_modalities or config.output_modalities)[0]
        check_modality(self._service, modality, "response", voice)
        instructions = config.instructions if own.instructions is None else own.instructions
        conversation = self._conversation if own.conversation == "auto" else None
        self._response = Response(
            self._service,
            self._send,
            Options(
                items,
                conversation,
                instructions,
                modality,
                voice,
                config.audio.output.speed if voice.speaker else 1.0,
                name,
                None if tokens == "inf" else tokens,
                config.truncation,
                own.metadata,
            ),
        )
        self._stop_idle()
        await self._response.begin()
        self._group.create_task(self._answer(self._response))

    def _input_item(self, value: dict[str, Any], index: int) -> Item:
        """An item that ``response.create`` names or carries."""
        where = f"response.input[{index}]"
        if value.get("type") == "item_reference":
            return self._conversation.find(str(value.get("id")), f"{where}.id")
        return parse_item(value, where)

    async def _answer(self, response: Response) -> None:
        await response.run()
        vad = self._config.audio.input.turn_detection
        if vad is not None and vad.idle_timeout_ms and not self._turns.speaking:
            played, wait = response.seconds, vad.idle_timeout_ms / 1000
            work = self._prompt_again(played, wait)
            self._idle = self._group.create_task(self._reported(work))

    async def _prompt_again(self, played: float, wait: float) -> None:
        """Answer the silence, once the last answer was played and ``wait`` seconds are over."""
        await asyncio.sleep(played)
        begin = self._turns.buffer.end
        await asyncio.sleep(wait)
        async with self._input:
            if self._turns.speaking:
                return
            self._idle = None
            end, item = self._turns.buffer.end, new_id("item")
            await self._send(
                "input_audio_buffer.timeout_triggered",
                audio_start_ms=milliseconds(begin),
                audio_end_ms=milliseconds(end),
                item_id=item,
            )
            await self._add_turn(self._turns.silence(begin), item)
            await self._respond({})

    def _stop_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    async def _cancel_response(self, event: events.CancelResponse) -> None:
        response = self._response
        if response is None or response.ended.is_set():
            raise ApiError(400, "there is no response to cancel", code="response_cancel_not_active")
        if event.response_id is not None and event.response_id != response.id:
            text = f"response_id: {response.id} is in progress, not {event.response_id[:100]!r}"
            raise ApiError(400, text, "response_id", "response_cancel_not_active")
        response.cancel("client_cancelled")
