"""`agentrl data validate` names what is wrong in every file that it is given."""

import json


def test_the_problems_of_all_files_are_named_and_end_with_status_1(agentrl, tmp_path):
    bad, missing = tmp_path / "bad.jsonl", tmp_path / "not_there.jsonl"
    bad.write_text(json.dumps({"id": "1", "question": "q?", "golden_answers": "text"}) + "\n")
    status, out, err = agentrl("data", "validate", bad, missing, bad)
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        f"{bad}:1: `golden_answers` is text; write a list of texts",
        f"{missing}: no such file; check the path",
    ]


def test_sound_files_are_counted(agentrl, questions):
    assert agentrl("data", "validate", questions) == (0, "1 file(s) sound\n", "")
