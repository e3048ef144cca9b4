"""The login form: its page, and its fields as browsers, Gradio's clients and scripts send them."""

from __future__ import annotations

import html
import string
from pathlib import Path
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from mochi_app.accounts import MAX_PASSWORD
from mochi_app.jobs import JOB_ID
from mochi_app.web.auth import Auth, LoginRefused, is_stranger
from mochi_app.web.middleware import MULTIPART_FORM, media_type

MAX_FIELDS = 8
MAX_FIELD_BYTES = 8 << 10  # more than the longest password
NEEDED = ("username", "password")
LOGIN_PAGE = string.Template((Path(__file__).parent / "login.html").read_text(encoding="utf-8"))


async def read_form(request: Request) -> dict[str, str]:
    """The fields of the request's form, the first of each name; empty if there is no form.

    Gradio's JavaScript client sends multipart/form-data, all others urlencoded forms.

    Raises:
        LoginRefused: it is multipart and malformed, has a file, or lacks name or password.
    """
    if media_type(request.headers) != MULTIPART_FORM:
        return parse_form(await request.body())
    fields: dict[str, str] = {}
    try:
        async with request.form(
            max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        ) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    raise LoginRefused(415, f"{name[:80]!a} is a file: a login takes none")
                fields.setdefault(name, value[: MAX_PASSWORD + 1])
    except HTTPException as error:
        detail = f"the form cannot be read as {MULTIPART_FORM}: {error.detail}"
        raise LoginRefused(400, detail) from None
    except ValueError:  # from codecs that are not charsets, which Starlette tries as well
        detail = f"the form cannot be read as {MULTIPART_FORM}: expected text in UTF-8"
        raise LoginRefused(400, detail) from None
    if missing := [name for name in NEEDED if name not in fields]:
        raise LoginRefused(400, f"the form has no field {' and no field '.join(missing)}")
    return fields


def parse_form(body: bytes) -> dict[str, str]:
    """The fields of an urlencoded form."""
    try:
        fields = parse_qs(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        return {}
    return {name: values[0][: MAX_PASSWORD + 1] for name, values in fields.items()}


def page_url(job: str) -> str:
    """URL of the page, with the requested job; relative, as the app may be under a prefix."""
    return f"./?job={job}" if JOB_ID.fullmatch(job) else "./"


def login_page(
    job: str, problem: str = "", status: int = 200, headers: dict[str, str] | None = None
) -> HTMLResponse:
    """The form, with the problem of the last attempt."""
    text = LOGIN_PAGE.substitute(
        job=html.escape(job if JOB_ID.fullmatch(job) else ""),
        problem=html.escape(problem),
        hidden="" if problem else "hidden",
    )
    return HTMLResponse(text, status, {"cache-control": "no-store"} | (headers or {}))


def add_login(app: FastAPI, auth: Auth) -> None:
    """Add /login and /logout to the parent app; before Gradio, which has its own."""
    router = APIRouter()

    @router.api_route("/login", methods=["GET", "HEAD"])
    async def show(request: Request, job: str = "") -> Response:
        """The form; redirects to the page if no login is needed."""
        if not is_stranger(request):
            return RedirectResponse(page_url(job), 303)
        return login_page(job)

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        """Check name and password; a browser gets the page, a program `{"success": true}`."""
        browser = "text/html" in request.headers.get("accept", "")
        job = ""
        try:
            form = await read_form(request)
            job = form.get("job", "")
            answer: Response = JSONResponse({"success": True})
            if browser:
                answer = RedirectResponse(page_url(job), 303)
            if auth.closed:
                name, password = form.get("username", "").strip(), form.get("password", "")
                auth.remember(answer, request, await auth.log_in(request, name, password))
            return answer
        except LoginRefused as refused:
            retry = {"retry-after": f"{refused.retry:.0f}"} if refused.retry else {}
            if browser:
                return login_page(job, str(refused), refused.status, retry)
            return JSONResponse({"detail": str(refused)}, refused.status, retry)

    @router.api_route("/logout", methods=["GET", "POST"])
    async def log_out(request: Request) -> Response:
        """End the login and delete its cookie."""
        await auth.log_out(request)
        answer = RedirectResponse("login" if auth.closed else "./", 303)
        answer.delete_cookie(auth.login_cookie, httponly=True, samesite="lax")
        return answer

    app.include_router(router)
