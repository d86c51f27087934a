"""A judge on this machine that answers as it is told, and ends by itself."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fake:
    """`answers`: what each next request gets, the last one for ever: a score, a text, a status, (status, headers), or a function of the
    handler. `seen`: what was asked; `headers`: of each request."""

    def __init__(self, *answers):
        self.answers, self.seen, self.headers, self.lock = list(answers), [], [], threading.Lock()

    def answer(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.seen.append(body)
            self.headers.append(dict(handler.headers))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer(handler)
        if answer is None:
            return
        status, headers, content = 200, {}, b""
        if isinstance(answer, tuple):
            status, headers = answer
        elif isinstance(answer, int) and answer > 99:
            status = answer
        elif isinstance(answer, bytes):
            content = answer
        else:
            text = answer if isinstance(answer, str) else f'Well. {{"reason": "so it is", "score": {answer}}}'
            usage = dict(prompt_tokens=1000, completion_tokens=50)
            content = json.dumps(dict(choices=[dict(message=dict(content=text))], usage=usage)).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextlib.contextmanager
def serving(*answers):
    """(the fake, its address)"""
    fake = Fake(*answers)

    class Handler(BaseHTTPRequestHandler):
        timeout = 20

        def do_POST(self):
            with contextlib.suppress(OSError):
                fake.answer(self)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield fake, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
