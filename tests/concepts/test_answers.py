"""Reading what models and servers really say."""
import json
import time

import pytest

from cft.concepts.answers import Reply, advised, nothing_of_use, one_line, parse_items, read_reply, server_words

JSON = '{"items": ["a beak", "wings"]}'
BOTH = ["a beak", "wings"]

@pytest.mark.parametrize(
    "raw",
    [  # all of them say the same two things
        JSON, JSON + "\n", "\ufeff" + JSON, JSON + "<|im_end|>", JSON + "</s>", f"```json\n{JSON}\n```",
        f"~~~\n{JSON}\n~~~", f"Sure! Here you go:\n\n```json\n{JSON}\n```\nLet me know if you need more.",
        f"Here it is: {JSON} Enjoy!", f"<think>- a song\n- a nest</think>\n{JSON}", f"<think>\n\n</think>\n\n{JSON}",
        f"- a song\n</think>{JSON}", f"<thinking>1. a song</thinking>{JSON}",
        f"<think>a<think>b</think>\n- c</think>{JSON}", f"◁think▷- x◁/think▷{JSON}", f"[THINK]- x[/THINK]{JSON}",
        f"{JSON}\n<think>- later thoughts", f"<reasoning>- x</reasoning><answer>{JSON}</answer>",
        f"<|channel|>analysis<|message|>- x<|end|><|start|>assistant<|channel|>final<|message|>{JSON}<|return|>",
        '["a beak", "wings"]', '```\n["a beak", "wings"]\n```', '["a beak", "wings",]',
        '{"items": ["a beak", "wings",],}', "['a beak', 'wings']", "{'items': ['a beak', 'wings']}",
        '["a beak", "wings", ...]', '("a beak", ["a beak", "wings"])', "{“items”: [“a beak”, “wings”]}",
        '{"items": ["a\\u0020beak", "w\\u0069ngs"]}', '{"items": ["a\xa0beak", "wings\u200b"]}',
        '{"concepts": ["a beak", "wings"]}', '{"Items": ["a beak", "wings"]}',
        '{"items": ["a beak", "wings"], "class": "bird"}', '{"answer": {"items": ["a beak", "wings"]}}',
        '{"note": "x", "items": ["a beak", 7, null, "wings"]}',
        '{"items": [{"name": "a beak", "why": "it is long"}, {"name": "wings"}]}',
        '[{"id": 1, "label": "A beak"}, {"label": "wings"}]',
        '{"features": [{"feature": "a beak", "score": 0.9}, {"feature": "wings"}]}',
        '{"items": {"1": "a beak", "2": "wings"}}', '{"important": ["a beak"], "other": ["wings"]}',
        '[{"part": "head", "items": ["a beak"]}, ["wings"]]', '{"item": "a beak"}\n{"item": "wings"}',
        '["a beak"]\n["wings"]', '1. {"name": "a beak"}\n2. {"name": "wings"}', '{"items": ["1. a beak", "- wings"]}',
        '{"items": ["**a beak**: curved", "\\"wings\\""]}', 'I used {"items": ["..."]}.\n' + JSON, "- a beak\n- wings",
        "* a beak\n* wings", "• a beak\n• wings", "– a beak\n— wings", "-a beak\n-wings", "+ a beak\n+ wings",
        "- a beak\r\n- wings\r\n", "1. a beak\n2. wings", "1) a beak\n2) wings", "(1) a beak\n(2) wings",
        "1.a beak\n2.wings", "a) a beak\nb) wings", "- [ ] a beak\n- [x] wings", "✓ a beak\n✓ wings",
        "> - a beak\n> - wings", "```\n- a beak\n- wings\n```", "  - a beak\n  - wings", "- a\n  beak\n- wings",
        "Of course:\n\n- a beak\n- wings\n\nThese are the parts of a bird.", "1. a beak\n2. wings\nI hope this helps!",
        "**Parts**\n\n- a beak\n- wings\n\n**Note**\nBirds fly.", "---\n- a beak\n- wings\n---",
        "- **A beak**: very long\n- **Wings**: broad", "- **A beak:** very long\n- **Wings:** broad",
        "1. **A beak** - long\n2. **Wings** (broad)", "**1. A beak**: long\n**2. Wings**: broad",
        "- a beak: long\n- wings: broad", "- a beak – long\n- wings - broad", "- *A beak*\n- _Wings_",
        "- `a beak`\n- `wings`", '- "a beak"\n- “wings”', "- 'a beak',\n- ‘wings’.", "- A Beak.\n- WINGS;",
        "| Concept | Why |\n|---|---|\n| a beak | long |\n| wings | broad |",
        "| # | Part |\n|:-:|:--|\n| 1 | a beak |\n| 2 | **wings** |",
        "Part | Why\n--- | ---\na beak | long\nwings | broad", "<ul><li>a beak</li><li>wings</li></ul>",
        "- <b>a beak</b>: long\n- <i>wings</i>", "items:\n  - a beak\n  - wings"])
def test_a_list_is_found_in_whatever_it_comes(raw):
    assert parse_items(raw) == BOTH

@pytest.mark.parametrize("raw, item", [('- says "bookstore"', 'says "bookstore"'),
                                       ("- says “bookstore”", "says “bookstore”"), ("- bird's nest", "bird's nest"),
                                       ('- "long" and "thin"', '"long" and "thin"'),
                                       ('- "says "bookstore""', 'says "bookstore"'), ("- birds' nests", "birds' nests"),
                                       ("- a 3.5 mm jack", "a 3.5 mm jack"), ("- a 10:30 train", "a 10:30 train"),
                                       ("- t-shirt", "t-shirt"), ("- beak (bill)", "beak (bill)"),
                                       ('{"items": ["says \\"bookstore\\""]}', 'says "bookstore"'),
                                       ('["it\'s red"]', "it's red"), ("['it\\'s red']", "it's red"),
                                       ('{"items": ["Straße"]}', "straße"), ('{"items": ["caf\\u00e9"]}', "café"),
                                       ("- e\u0301cu", "\u00e9cu"), ("- 鳥", "鳥"),
                                       ('{"items": ["two\\nlines"]}', "two\nlines"),
                                       ('{"items": ["\\u001b[31mred"]}', "\x1b[31mred")])  # dropped by the filters
def test_an_item_stays_whole(raw, item):
    assert parse_items(raw) == [item]

@pytest.mark.parametrize("raw", [
    "<think>- a beak\n- wings", '<think>{"items": ["a beak"]}', "◁think▷- a beak",
    "<|channel|>analysis<|message|>- a beak", "<think></think>", '{"items": ["a beak", {"name": "x"}, "wi',
    '[["a beak"], ["wi', '```json\n{"items": ["a beak"', '{"error": "try later"}', '{"items": ["...", "-"]}',
    "| a | b |", "a beak, wings", "I'm sorry, I can't help with that.", "{}", "[[]]", '"a beak"', "-\n-\n-"])
def test_a_thought_a_torn_value_or_a_sentence_is_no_answer(raw):
    with pytest.raises(ValueError, match="expected a JSON object"):
        parse_items(raw)

@pytest.mark.parametrize("raw", [
    "<think>" * 14_000, "[" * 99_999, '{"a":' * 20_000, "|" + " " * 99_999 + "x", "*" * 99_999, '- "' + '"' * 99_999,
    "<|" * 50_000, "{'a'" * 20_000, "\\" * 99_999, "- " * 50_000, "<|channel|>final" * 6_000, " " * 99_999 + "x",
    "- a\n" * 25_000], ids=range(13))
def test_no_answer_keeps_the_reader_busy(raw):
    start = time.process_time()
    try:
        parse_items(raw)
    except ValueError:
        pass
    assert time.process_time() - start < 3

def body(content=JSON, ending="stop", **more):
    return {"choices": [{"message": {"content": content, **more}, "finish_reason": ending}]}

@pytest.mark.parametrize("usage, tokens",
                         [({"prompt_tokens": 3, "completion_tokens": 2}, (3, 2)), (None, (0, 0)), ([], (0, 0)),
                          ("many", (0, 0)), (7, (0, 0)), ({"prompt_tokens": "3"}, (0, 0)),
                          ({"prompt_tokens": None, "completion_tokens": 2.0}, (0, 2)), ({"input_tokens": -1}, (0, 0)),
                          ({"prompt_tokens": {"text": 3}}, (0, 0)), ({"prompt_tokens": 1e308}, (0, 0)),
                          ({"prompt_tokens": float("nan")}, (0, 0))])
def test_odd_bookkeeping_spoils_no_answer(usage, tokens):
    assert read_reply(json.dumps(body() | {"usage": usage})) == Reply(JSON, "ok", tokens)

@pytest.mark.parametrize("given, status",
                         [(body([{"type": "text", "text": JSON}]), "ok"),
                          (body([{"type": "thinking", "thinking": "- x"}, {"type": "text", "text": JSON}]), "ok"),
                          (body(["- a beak\n", "- wings"]), "ok"), (body({"items": ["a beak", "wings"]}), "ok"),
                          (body(None, reasoning_content=JSON), "ok"), (body(JSON, reasoning_content="- x"), "ok"),
                          (body(None, reasoning_content="- a thought"), "malformed"),
                          (body("", reasoning="- a thought", ending="length"), "truncated"),
                          (body(JSON[:9], "length"), "truncated"),
                          ({"choices": [{"text": JSON, "finish_reason": "stop"}]}, "ok"),
                          (body(refusal="No."), "refused"), ({"error": {"message": "no"}}, "error"),
                          ({"error": "no"}, "error"), ({"object": "error", "message": "no"}, "error"),
                          (body() | {"error": None}, "ok"),
                          ({"status": "failed", "error": {"message": "no"}, "output": []}, "error")])
def test_responses_of_many_servers(given, status):
    reply = read_reply(json.dumps(given))
    assert reply.status == status and (status != "ok" or parse_items(reply.raw) == BOTH)
    assert status != "error" or reply.raw == "no"

def test_an_abyss_of_brackets_is_malformed():
    assert read_reply("[" * 99_999).status == "malformed"

@pytest.mark.parametrize("text, words", [
    ('{"error": {"message": "bad", "param": "top_p", "code": "x"}}', "bad; top_p; x"), ('{"error": "bad"}', "bad"),
    ('{"detail": [{"loc": ["body", "top_p"], "msg": "not permitted", "input": 1}]}', "not permitted; body; top_p"),
    ('{"detail": "Not Found"}', "Not Found"), ('[{"error": {"message": "bad"}}]', "bad"),
    ("<h1>502</h1>\nBad", "502 Bad"), ("\x1b[31mred\x07\n\u202eevil", "[31mred evil"), ("", ""),
    ("[" * 5000, "[" * 400)])
def test_a_servers_words_are_one_harmless_line(text, words):
    assert server_words(text) == words and one_line(words) == words

@pytest.mark.parametrize("said, option", [("401 Incorrect API key", "OPENAI_API_KEY"),
                                          ("403 no access", "OPENAI_API_KEY"), ("404 Not Found", "--base-url …/v1"),
                                          ("404 Unexpected endpoint or method. (POST /x)", "--base-url …/v1"),
                                          ("404 model 'm' not found", "--model"),
                                          ("400 temperature must be 1", "--temperature none"),
                                          ("400 maximum context length is 512", "--max-tokens"),
                                          ("429 insufficient_quota", "the account"), ("598 no answer", "--timeout"),
                                          ("599 refused", "--base-url"), ("503 busy", "later")])
def test_an_error_names_the_option(said, option):
    assert option in advised(said) and not advised(said).startswith("59")

def test_nothing_of_use_counts():
    error = nothing_of_use([Reply("", "truncated"), Reply("", "truncated"), Reply("I think\x1b so", "malformed")])
    assert str(error) == ("none of 3 answers can be used (2 truncated, 1 malformed); the last says: I think so; "
                          "give another --max-tokens")
