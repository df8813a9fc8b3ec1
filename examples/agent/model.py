"""A model that says what it was told to, for openai-agents without a network: in this example, and in tests."""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from agents import Model, ModelResponse, Usage
from agents.items import TResponseInputItem, TResponseStreamEvent
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText


class Call(NamedTuple):
    """A tool that the model wants to be called."""

    tool: str
    arguments: dict[str, Any]


#: What the model says at once: calls of tools, or a text, in which {} stands for what the last tool said.
Turn = Sequence[Call] | str


class ScriptedModel(Model):
    """Says to each question the turns that *script* has for it, one after the other.

    How far it has come it reads from the conversation, so it needs not be the same object, or process, all the time.
    """

    def __init__(self, script: Mapping[str, Sequence[Turn]]) -> None:
        self._script = script

    async def get_response(
        self,
        system_instructions: str | None,  # noqa: ARG002 - and the others: the signature is the SDK's
        input: str | list[TResponseInputItem],  # noqa: A002
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        items: list[Any] = [{"role": "user", "content": input}] if isinstance(input, str) else input
        asked = max(at for at, item in enumerate(items) if item.get("role") == "user")
        answers = [item["output"] for item in items[asked:] if item.get("type") == "function_call_output"]
        turn = self._turn(items[asked]["content"], len(answers))
        if isinstance(turn, str):
            text = turn.replace("{}", text_of(answers[-1])) if answers else turn
            content = ResponseOutputText(type="output_text", text=text, annotations=[])
            output: list[Any] = [
                ResponseOutputMessage(
                    id=f"message-{len(items)}", type="message", role="assistant", status="completed", content=[content]
                )
            ]
        else:
            output = [
                ResponseFunctionToolCall(
                    type="function_call",
                    call_id=f"call-{len(items)}-{number}",
                    name=call.tool,
                    arguments=json.dumps(call.arguments),
                )
                for number, call in enumerate(turn)
            ]
        return ModelResponse(output=output, usage=Usage(), response_id=None)

    def _turn(self, question: str, answered: int) -> Turn:
        """Return the turn after *answered* calls."""
        before = 0
        for turn in self._script[question]:
            if isinstance(turn, str) or before >= answered:
                return turn
            before += len(turn)
        raise IndexError(f"the script has no end for {question!r}")

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[TResponseStreamEvent]:
        raise NotImplementedError


def text_of(answer: Any) -> str:
    """Return the text of what a tool has answered, as it stands in a conversation."""
    return answer if isinstance(answer, str) else "".join(part.get("text", "") for part in answer)
