"""Errors as OpenAI's clients read them."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

INVALID = "invalid_request_error"
NOT_FOUND = "model_not_found"
UNREACHABLE = "adapters_unreachable"
SOON = 5.0
"""Seconds after which a replica that is not there may be."""
REASON = "reason"
"""Key of the request's state that says why it was refused."""


class ApiError(Exception):
    """An answer that is an error. `param` is the field that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def reason(self) -> str:
        """In one word, for those who count."""
        return self.code or self.kind

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


class BadRequestError(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(400, message, INVALID, param, code)


class NotFoundError(ApiError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(404, message, INVALID, param, code)


class ForbiddenError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(403, message, "permission_error", code="insufficient_permissions")


class ConflictError(ApiError):
    def __init__(self, message: str, code: str, retry_after: float) -> None:
        super().__init__(409, message, "conflict_error", code=code, retry_after=retry_after)


class BusyError(ApiError):
    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)


def of_adapter(message: str, code: str | None, param: str | None) -> ApiError:
    """The answer to who names an adapter that is not there, that cannot be used, or of which nobody knows now."""
    if code == UNREACHABLE:
        return ApiError(503, message, "server_error", param, code, retry_after=SOON)
    kind = NotFoundError if code == NOT_FOUND else BadRequestError
    return kind(message, param, code)


def of_failure(values: dict[str, Any], param: str = "adapters", model: str | None = None) -> ApiError:
    """The answer where a replica could not do what was asked.

    param: the field that names adapters, where `model` does not.
    """
    match values["kind"]:
        case "adapter":
            return of_adapter(values["message"], values["code"], "model" if values["name"] == model else param)
        case "in_use":
            return ConflictError(values["message"], "adapters_in_use", values["retry_after"])
        case "busy":
            return BusyError(values["message"], values["retry_after"])
        case "deadline":
            return ApiError(504, values["message"], "timeout_error", code="deadline_exceeded")
        case "stopped":
            return ApiError(503, values["message"], "server_error", code="replica_lost", retry_after=SOON)
        case "invalid":
            return BadRequestError(values["message"], values["param"])
        case _:
            return ApiError(500, values["message"], "server_error", code="internal_error")


def first_problem(error: RequestValidationError) -> BadRequestError:
    """What is wrong with a request, in one sentence."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part not in ("body", "query", "path"))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return BadRequestError(f"the request is no JSON: {problem.get('ctx', {}).get('error', message)}")
    if problem["type"] == "extra_forbidden":
        return BadRequestError(f"{place}: no such field", place, "unknown_parameter")
    if problem["type"] == "missing":
        return BadRequestError(f"{place}: is missing" if place else "the request has no body", place or None)
    return BadRequestError(f"{place}: {message}" if place else message, place or None)


async def answer_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)  # noqa: S101
    return _answer(request, error)


async def answer_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    return _answer(request, first_problem(error))


async def answer_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    kind = INVALID if error.status_code < 500 else "server_error"
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is nothing at this path; {request.scope.get('root_path', '')}/docs lists all that there are"
    answer = _answer(request, ApiError(error.status_code, message, kind))
    answer.headers.update(error.headers or {})
    if error.status_code == 405:
        answer.headers["Allow"] = _allowed(request)
    return answer


async def answer_defect(request: Request, error: Exception) -> JSONResponse:
    """What went wrong is for the log, to which the error goes on from here."""
    return _answer(
        request, ApiError(500, "the server has a defect, which its log tells", "server_error", code="internal_error")
    )


def _allowed(request: Request) -> str:
    """The methods of all routes of a path, of which Starlette names those of the first."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
    return ", ".join(sorted({method for route in routes for method in route.methods}))


def _answer(request: Request, error: ApiError) -> JSONResponse:
    setattr(request.state, REASON, error.reason)
    return JSONResponse(error.body, error.status, headers=error.headers)
