"""Every failure as the OpenAI error object: {"error": {"message", "type", "param", "code"}}."""

import json
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from aiohttp import web

log = logging.getLogger("fp4flash.server")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
INVALID = "invalid_request_error"
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A refusal with an HTTP status. `param` names the field, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> web.Response:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.json_response(self.body, status=self.status, headers=headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit:,} bytes; send less, or start the server with a larger --max-body-mb",
        code="body_too_large",
    )  # fmt: skip


def engine_failure(message: str) -> ApiError:
    return ApiError(500, f"the engine failed on this request: {message}", type="server_error", code="engine_error")


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, type="service_unavailable", code=code)


@web.middleware
async def as_error_objects(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever a handler raises becomes an error object; what nobody foresaw is logged and answered with 500."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge:
        return too_large(request.client_max_size).response()
    except web.HTTPException as error:
        what = f"{request.method} {request.path}"
        reasons = {404: f"{what}: no such path", 405: f"{what}: this path takes {error.headers.get('Allow', '')}"}
        phrase = HTTPStatus(error.status).phrase
        reply = ApiError(error.status, reasons.get(error.status, f"{what}: {phrase}"))
        return reply.response()
    except ConnectionError:
        raise  # the client went away: aiohttp closes quietly
    except Exception:
        log.exception("%s %s", request.method, request.path)
        return ApiError(500, "internal error; the server's log has it", type="server_error").response()


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        ApiError: 413 for a body over the limit, 400 for anything that is not a JSON object in valid Unicode.
    """
    if (request.content_length or 0) > request.client_max_size:
        raise too_large(request.client_max_size)
    raw = await request.read()
    try:
        text = raw.decode()
        body = json.loads(text, parse_constant=no_constant)
        if "\\ud" in text or "\\uD" in text:  # an escaped half of a surrogate pair is no character
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise bad(f"the body is not valid UTF-8 text: {error.reason if hasattr(error, 'reason') else error}") from error
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise bad(f"the body is a JSON {type(body).__name__}; expected an object")
    return body


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
