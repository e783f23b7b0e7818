"""Tables of whole models from a file of results."""

from __future__ import annotations

import json

from mixllm_compiler.report.results_table import filled


def test_a_table_of_speeds_states_bits_accuracy_and_tokens_per_second(tmp_path):
    line = {"variant": "ours", "decoder bits": 4.4, "head bits": 6.5625, "true bits": 4.709}
    line |= {"prefill tokens/s": 2400.4, "decode tokens/s": 171.6}
    line |= {"KL text": 0.00204, "se text": 0.00004}
    content = {"command": "python x.py", "commit": "abc", "device": "2 cores", "rows": [line]}
    (tmp_path / "x.json").write_text(json.dumps(content | {"versions": {"torch": "2.13.0"}}))
    table = filled("<!-- results: x.json speeds -->\nold\n<!-- end -->", tmp_path).splitlines()
    assert table[1] == (
        "|  | decoder bits | head bits | true bits | 1000 KL, text | prefill tokens/s "
        "| decode tokens/s |"
    )
    assert table[3] == "| ours | 4.40 | 6.56 | 4.71 | 2.04 ± 0.04 | 2,400 | 172 |"
    assert table[-1] == "<!-- end -->" and "old" not in table
