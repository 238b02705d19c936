"""Security headers on every answer, in one place."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# JSON and files: should a browser ever show one as a page, nothing in it is loaded or run.
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
# A report: one page with its style in it, without script, made of names that users chose.
REPORT_POLICY = f"{DATA_POLICY}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# The pages of FastAPI: a script in the page, which loads Swagger UI or ReDoc from their CDN. They
# show nothing that a user chose.
DOCS = ("/docs", "/redoc")
DOCS_POLICY = (
    f"{DATA_POLICY}; connect-src 'self'; worker-src blob:; base-uri 'none'; form-action 'none';"
    " script-src 'unsafe-inline' https://cdn.jsdelivr.net;"
    " style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com;"
    " font-src https://fonts.gstatic.com;"
    " img-src 'self' data: https://fastapi.tiangolo.com https://cdn.redoc.ly"
)
# Answers with secrets in them.
SECRET = ("/v1/keys", "/v1/webhooks")


class SecurityHeaders:
    """ASGI middleware; outermost, so that refusals and failures have the headers too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["Content-Security-Policy"] = _policy(path, headers.get("content-type", ""))
                if path.startswith(SECRET):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _policy(path: str, media_type: str) -> str:
    if path.startswith(DOCS):
        return DOCS_POLICY
    return REPORT_POLICY if media_type.startswith("text/html") else DATA_POLICY
