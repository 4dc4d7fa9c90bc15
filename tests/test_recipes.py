"""Recipes: what is in them, what is refused, what differs."""

import pytest

from evalkit import recipes
from evalkit.errors import InputError, UnknownName

COLUMNS = ("mmlu_0shot mmlu_5shot gsm_direct gsm_cot bbh_direct bbh_cot tydiqa_gp tydiqa_cb codex_p1 codex_p10 "
           "alpaca_farm").split()


@pytest.mark.parametrize("name", ["tulu-2023-06", "tulu-2023-11", "clean"])
def test_every_recipe_has_the_eleven_columns(name):
    recipe = recipes.load(name)
    assert [c.name for c in recipe.columns] == COLUMNS
    assert recipe.benchmarks == ("mmlu", "gsm", "bbh", "tydiqa", "codex", "alpaca_farm")
    assert all(set(c.switches) == {*recipes.SWITCHES, "benchmark"} for c in recipe.columns)


def test_the_papers_subsets_shots_and_decoding():
    switches = {c.name: c.switches for c in recipes.load("tulu-2023-06").columns}
    assert {n: s["draw"] for n, s in switches.items() if s["draw"]} == {
        "gsm_direct": 200, "gsm_cot": 200, "bbh_direct": 40, "bbh_cot": 40, "tydiqa_gp": 100, "tydiqa_cb": 100}
    assert [s["shots"] for s in switches.values()] == [0, 5, 8, 8, 3, 3, 1, 1, 0, 0, 0]
    assert [s["max_tokens"] for n, s in switches.items() if not n.startswith("mmlu")] == [512] * 4 + [50] * 2 + [
        512, 512, 2048]
    p1, p10 = switches["codex_p1"], switches["codex_p10"]
    assert [(s["samples"], s["temperature"], s["top_p"], s["k"], s["chat"]) for s in (p1, p10)] == [
        (20, 0.1, 0.95, 1, False), (20, 0.8, 0.95, 10, False)]
    assert [n for n, s in switches.items() if s["bos"] == "tokenizer"] == ["alpaca_farm"]


def test_differences_between_the_two_dates():
    a, b = (recipes.flat(recipes.load(name)) for name in ("tulu-2023-06", "tulu-2023-11"))
    changed = {key.partition(".")[2] for key in a if a[key] != b[key]}
    assert changed == {"bos", "fit", "over_context", "stop_when", "rule", "option_ids", "probs", "stop",
                       "strip_content", "stop_level", "config", "max_tokens", "paragraph_cut"}


def test_set_reaches_a_column_or_its_benchmark_and_is_kept():
    recipe = recipes.with_sets(recipes.load("tulu-2023-06"), ["gsm.draw=10", "bbh_cot.shots=2", 'gsm_cot.stop=["X"]'])
    by_name = {c.name: c.switches for c in recipe.columns}
    assert by_name["gsm_direct"]["draw"] == by_name["gsm_cot"]["draw"] == 10
    assert (by_name["bbh_cot"]["shots"], by_name["bbh_direct"]["shots"]) == (2, 3)
    assert by_name["gsm_cot"]["stop"] == ["X"]
    assert recipe.changed == ("gsm.draw=10", "bbh_cot.shots=2", 'gsm_cot.stop=["X"]')


@pytest.mark.parametrize(("item", "said"), [
    ("gsm.draww=1", "unknown switch 'draww'; did you mean 'draw'?"),
    ("gms.draw=1", "unknown column or benchmark 'gms'; did you mean 'gsm'?"),
    ("gsm.draw=many", "draw = 'many': must be a int"),
    ("gsm.draw=-1", "must not be negative"),
    ("gsm.bos=two", "bos = 'two': must be one of tokenizer, none"),
    ("gsm.draw", "the form is COLUMN_OR_BENCHMARK.SWITCH=VALUE"),
])
def test_bad_overrides_say_what_is_wrong(item, said):
    with pytest.raises(InputError) as caught:
        recipes.with_sets(recipes.load("tulu-2023-06"), [item])
    assert said in str(caught.value)


def test_a_users_recipe_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[gsm]\nshots = 8\n[gsm.columns.gsm_short]\nheader = "Short"\nmax_tokens = 9\n')
    recipe = recipes.load(str(path))
    assert (recipe.name, recipe.benchmarks, recipe.columns[0].switches["max_tokens"]) == ("mine", ("gsm",), 9)


@pytest.mark.parametrize(("text", "said"), [
    ("[gsm\n", "not valid TOML"),
    ("[gsm]\n", "a benchmark is a table with [NAME.columns.COLUMN]"),
    ("[gsm.columns.a]\nshotss = 1\n", "unknown switch 'shotss'"),
    ("seed = 1\n", "no columns"),
])
def test_a_bad_recipe_file_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        recipes.load(str(path))
    assert said in str(caught.value) and "bad.toml" in str(caught.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'tulu-2023-06'"):
        recipes.load("tulu-2023-6")


def test_select_keeps_the_recipes_order():
    recipe = recipes.load("tulu-2023-06")
    assert [c.name for c in recipes.select(recipe, "gsm,mmlu_5shot")] == ["mmlu_5shot", "gsm_direct", "gsm_cot"]
    with pytest.raises(UnknownName, match="did you mean"):
        recipes.select(recipe, "mmlu_5shots")
