"""What is wrong with a request, in OpenAI's form: every offence at once, each with the parameter that it is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

INVALID_REQUEST = "invalid_request_error"

_LISTED = 100  # offences of one request; a large body can hold very many
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


@dataclass(frozen=True)
class Offence:
    """One sentence, and the parameter as the client wrote it (`messages[1].role`); None when it is about no parameter."""

    message: str
    param: str | None = None


@dataclass(frozen=True)
class Quoting(Offence):
    """An offence whose message repeats what the client wrote; `logged` does not."""

    logged: str = ""


class ApiError(Exception):
    """Ends a request with a status and a body in OpenAI's form.

    Attributes:
        status: of HTTP. offences: at least one. code: a word for programs, or None. headers: to send along.
    """

    def __init__(
        self, status: int, offences: Iterable[Offence], *, code: str | None = None, retry_after: float | None = None, **headers: str
    ) -> None:
        self.status = status
        found = tuple(dict.fromkeys(offences))
        rest = len(found) - _LISTED
        self.offences = found if rest <= 0 else (*found[:_LISTED], Offence(f"and {rest} more"))
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after)))
        super().__init__("\n".join(offence.message for offence in self.offences))

    @property
    def reason(self) -> str:
        """The offences for the log, which holds nothing of what clients write in prompts."""
        return "; ".join(offence.logged if isinstance(offence, Quoting) else offence.message for offence in self.offences)

    @property
    def content(self) -> dict[str, Any]:
        """The body. OpenAI's form has room for one message and one parameter; several offences are also listed one by one."""
        error: dict[str, Any] = {
            "message": str(self),
            "type": _TYPES.get(self.status, INVALID_REQUEST),
            "param": self.offences[0].param,
            "code": self.code,
        }
        if len(self.offences) > 1:
            error["offences"] = [{"message": offence.message, "param": offence.param} for offence in self.offences]
        return {"error": error}


def invalid(offences: Iterable[Offence], code: str | None = None) -> ApiError:
    return ApiError(400, offences, code=code)


def raise_invalid(offences: Iterable[Offence]) -> None:
    """Raise a 400 if there is any offence."""
    found = tuple(offences)
    if found:
        raise invalid(found)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    message = f"the model {name[:80]!r} is not served; the server has {', '.join(known)}"
    return ApiError(404, [Offence(message, "model")], code="model_not_found")


def failure(why: str | None = None) -> ApiError:
    """An internal error; the log has the details, unless they may be shown."""
    return ApiError(500, [Offence(why or "the server failed while it ran this request")], code="internal_error")


def unavailable(why: str, retry_after: float) -> ApiError:
    return ApiError(503, [Offence(why)], code="unavailable", retry_after=retry_after)
