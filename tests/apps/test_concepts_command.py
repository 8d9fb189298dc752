"""`cft concepts` against servers that are slow, wrong or strict, and folders whose names are none."""
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from cft.apps.cli import main
from cft.concepts.filters import ConceptSet, Similarity

KEY = "sk-test-0123456789"
GOOD = '{"items": ["six legs"]}'

@pytest.fixture
def ask(tmp_path, monkeypatch, no_proxy, capsys):
    """Runs the command on drawn folders and a server of its own: the exit code, what is said, the requests, the set."""
    monkeypatch.setattr(Similarity, "best", lambda many=False: Similarity())
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen, servers = [], []

    def go(*words, reply=lambda body: (200, GOOD), folders=("ant",), yes=("--yes",), path="/v1"):
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append(body)
                status, out = reply(body)
                if isinstance(out, str):
                    out = {"choices": [{"message": {"content": out}, "finish_reason": "stop"}]}
                data = json.dumps(out).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name in folders:
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
        out, record = tmp_path / "c.json", tmp_path / "a.jsonl"
        given = {
            "--out": out, "--record": record, "--base-url": f"http://127.0.0.1:{server.server_port}{path}",
            "--model": "m"}
        given |= dict(zip(words[::2], words[1::2])) if not len(words) % 2 else {}
        with pytest.raises(SystemExit) as end:
            main(["concepts", str(tmp_path / "photos"), *(str(w) for pair in given.items() for w in pair), *yes])
        said = capsys.readouterr()
        assert KEY not in said.out + said.err and "Traceback" not in said.err and "\x1b" not in said.err.replace(
            "\x1b[A", "")
        return end.value.code, said.out + said.err, seen, out

    yield go
    for server in servers:
        server.shutdown()
        server.server_close()

def test_options_reach_the_request(ask):
    code, said, seen, out = ask("--temperature", "none", "--max-tokens", 77, "--workers", 2, "--timeout", 5)
    assert code == 0 and len(seen) == 6 and "temperature" not in seen[0] and seen[0]["max_tokens"] == 77
    assert ConceptSet.load(out).settings["sampling"]["temperature"] is None
    assert "compared by trigrams (spelling" in said and "classes  ant" in said
    code, said, _, _ = ask(yes=("--yes", "--spelling"))
    assert code == 0 and "compared by trigrams\n" in said

@pytest.mark.parametrize("words, said", [(("--temperature", "warm"), "--temperature must be a number or none"),
                                         (("--temperature", "nan"), "number or none"),
                                         (("--temperature", "3"), "0 to 2"), (("--max-tokens", 0), "between 1 and"),
                                         (("--workers", 0), "above 0"), (("--timeout", 0), "timeout"),
                                         (("--workers", 999999), "1 to 256"),
                                         (("--base-url", "localhost:1"), "base_url must be")])
def test_bad_options_cost_nothing(ask, words, said):
    code, told, seen, out = ask(*words)
    assert code == 2 and said in told and not seen and not out.exists()

@pytest.mark.parametrize("status, body, said",
                         [(401, {"error": {"message": f"Incorrect API key {KEY}"}}, "OPENAI_API_KEY"),
                          (404, {"error": "404 page not found"}, "--base-url …/v1"),
                          (200, {"error": "Unexpected endpoint"}, "--base-url …/v1"),
                          (404, {"error": {"message": "model 'm' not found\x1b[2J"}}, "--model"),
                          (400, {"error": "maximum context length"}, "--max-tokens"),
                          (200, "I would rather not talk about that.", "malformed")])
def test_no_success_without_a_result(ask, status, body, said):
    code, told, seen, out = ask(reply=lambda _: (status, body))
    assert code == 2 and said in told and not out.exists() and len(told.splitlines()) <= 12

def test_what_stays_in_doubt_is_said_by_name(ask):
    def reply(body):
        return 200, GOOD if '"ant"' in body["messages"][-1]["content"] else "no idea"

    code, told, _, out = ask(reply=reply, folders=("ant", "bee"))
    assert code == 0 and "doubt    1 classes have no concept: bee" in told and ConceptSet.load(out).of("bee") == ()

@pytest.mark.parametrize("folders, asked", [
    (("n01440764", "n01443537"), {"tench, Tinca tinca", "goldfish, Carassius auratus"}),
    (("001.Black_footed_Albatross", "002.Laysan_Albatross"), {"Black footed Albatross", "Laysan Albatross"}),
    (("0", "1"), set())])
def test_the_model_is_asked_for_names(ask, folders, asked):
    code, told, seen, out = ask(folders=folders)
    assert {json.loads(body["messages"][-1]["content"])["class"] for body in seen} == asked
    assert code == (0 if asked else 2) and ("--names FILE" in told) == (not asked)

def test_numbers_have_names_in_a_file(ask, tmp_path):
    (tmp_path / "names.txt").write_text("tench\ngold fish\n")
    code, told, seen, out = ask("--names", tmp_path / "names.txt", folders=("0", "1"))
    assert code == 0 and [c.name for c in ConceptSet.load(out).classes] == ["tench", "gold fish"]

def test_without_a_terminal_it_asks_for_yes(ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, told, seen, out = ask(yes=())
    assert code == 2 and "give --yes" in told and not seen and not out.exists()

def test_places_are_tried_before_anything_is_paid(ask, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text("{}")
    for words in (("--out", tmp_path / "file/c.json"), ("--out", tmp_path), ("--out", tmp_path / ("n" * 300)),
                  ("--out", "/proc/c.json"), ("--out", tmp_path / "a.jsonl"), ("--record", tmp_path / "file/a.jsonl"),
                  ("--record", tmp_path / "other.json"), ("--record", tmp_path)):
        code, told, seen, _ = ask(*words)
        assert code == 2 and not seen and str(words[1])[-20:] in told.replace("\n", ""), words
