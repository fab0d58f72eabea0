"""References to the Hub, and the choice among a repository's files: pure functions."""

from __future__ import annotations

import pytest

from mobile_gguf.errors import ModelNotFoundError, UsageError
from mobile_gguf.hub.reference import Reference, is_reference, looks_like_repository, parse_reference
from mobile_gguf.hub.variants import RemoteFile, choose, find_variants, models_among


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("hf:org/repo", "hf:org/repo"),
        ("org/repo", "hf:org/repo"),
        ("hf:org/repo:Q4_K_M", "hf:org/repo:Q4_K_M"),
        ("org/repo:q8_0", "hf:org/repo:q8_0"),
        ("hf:org/repo/sub/m.gguf", "hf:org/repo/sub/m.gguf"),
        ("hf:org/repo@v1", "hf:org/repo@v1"),
        ("hf:org/repo:UD-Q4_K_XL@refs/pr/7", "hf:org/repo:UD-Q4_K_XL@refs/pr/7"),
        ("hf:org/repo@v1:Q6_K", "hf:org/repo:Q6_K@v1"),
        ("hf:org/repo/m.gguf@c0ffee1", "hf:org/repo/m.gguf@c0ffee1"),
        ("hf.co/org/repo:Q4_K_M", "hf:org/repo:Q4_K_M"),
        ("https://huggingface.co/org/repo", "hf:org/repo"),
        ("https://huggingface.co/org/repo/", "hf:org/repo"),
        ("https://huggingface.co/org/repo/tree/main", "hf:org/repo"),
        ("https://huggingface.co/org/repo/tree/v2/Q4_K_M", "hf:org/repo@v2"),
        ("https://huggingface.co/org/repo/blob/main/a%20b.gguf", "hf:org/repo/a b.gguf"),
        ("https://huggingface.co/org/repo/resolve/v1/d/m.gguf?download=true", "hf:org/repo/d/m.gguf@v1"),
        ("https://huggingface.co/org/repo/blob/refs/pr/3/m.gguf", "hf:org/repo/m.gguf@refs/pr/3"),
    ],
)
def test_what_people_paste(text: str, exact: str) -> None:
    reference = parse_reference(text)
    assert str(reference) == exact
    assert parse_reference(exact) == reference


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:", "no repository"),
        ("hf:repo", "the organisation is missing, write hf:ORG/repo"),
        ("hf:repo:Q4_K_M", "write hf:ORG/repo"),
        ("hf:org/repo:m.gguf", "write hf:org/repo/m.gguf"),
        ("hf:org/repo/config.json", "names no GGUF file: write hf:org/repo, hf:org/repo:Q4_K_M"),
        ("hf:org/repo/m.gguf:Q4_K_M", "a file and a quantisation"),
        ("hf:org/repo@a:Q4@b", "two revisions"),
        ("hf:org/../x.gguf", "no"),
        ("hf:org/repo/../x.gguf", "no model"),
        ("hf:org/repo//x.gguf", "no model"),
        ("hf:org/repo@../x", "no model"),
        ("hf:a--b/repo", "no repository's name"),
        ("https://example.com/org/repo", "not on the Hugging Face Hub"),
        ("https://huggingface.co/datasets/org/x", "a data set, not a model"),
        ("https://huggingface.co/spaces/org/x", "a Space, not a model"),
        ("https://huggingface.co/org", "organisation is missing"),
    ],
)
def test_what_is_no_reference(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_reference(text)
    assert said in str(error.value)


def test_what_is_taken_for_the_hub() -> None:
    assert all(map(is_reference, ("hf:x", "https://huggingface.co/a/b", "hf.co/a/b")))
    assert not any(map(is_reference, ("a/b", "./hf:x", "demo", "m.gguf", "/x")))
    assert looks_like_repository("org/repo:Q4_K_M")
    assert not any(map(looks_like_repository, ("a/b.gguf", "/a/b", "a/b/c", "./m")))


def variants_of(*names: str):
    return find_variants(RemoteFile(name, 100 + i, "a" * 64) for i, name in enumerate(names))


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen3-30b-a3b-q4_k_m.gguf", "q4_k_m"),
        ("model.Q5_K_S.gguf", "Q5_K_S"),
        ("Model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Model.i1-IQ3_XXS.gguf", "i1-IQ3_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "mxfp4"),
        ("m-BF16.gguf", "BF16"),
        ("Q8_0/m-00001-of-00001.gguf", "Q8_0"),
        ("m-q4_k_m.mobile.gguf", "q4_k_m"),
        ("m-TQ1_0.gguf", "TQ1_0"),
        ("olmoe-1b-7b-0924.gguf", ""),
        ("Qwen2-57B.gguf", ""),
    ],
)
def test_the_tag_in_a_name(name: str, quant: str) -> None:
    (variant,) = variants_of(name)
    assert variant.quant == quant
    assert variant.is_complete


def test_parts_are_one_model() -> None:
    names = [f"BF16/m-BF16-{i:05}-of-00012.gguf" for i in range(1, 13)]
    (variant,) = variants_of(*reversed(names))
    assert [file.path for file in variant.files] == names
    assert (variant.path, variant.is_complete) == (names[0], True)
    assert not variants_of(*names[1:])[0].is_complete


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"], "m-Q4_K_M.gguf"),
        (["m-Q8_0.gguf", "m-Q5_K_M.gguf", "m-Q3_K_M.gguf"], "m-Q5_K_M.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-UD-Q8_K_XL.gguf"], "m-UD-Q4_K_XL.gguf"),
        (["m-UD-Q4_K_M.gguf", "m-Q4_K_M.gguf"], "m-Q4_K_M.gguf"),
        (["m-BF16.gguf", "m-F16.gguf"], "m-BF16.gguf"),
        (["m.gguf"], "m.gguf"),
        (["mmproj-m-f16.gguf", "m-Q4_0.gguf", "imatrix.gguf"], "m-Q4_0.gguf"),
    ],
)
def test_the_choice_without_a_wish(names: list[str], chosen: str) -> None:
    variant, note = choose(Reference("org/r"), variants_of(*names))
    assert variant.path == chosen
    assert bool(note) == (len(models_among(variants_of(*names))) > 1)
    assert not note or variant.quant in note


@pytest.mark.parametrize(
    ("wish", "chosen"),
    [
        (":Q4_K_M", "m-Q4_K_M.gguf"),
        (":q4_k_m", "m-Q4_K_M.gguf"),
        (":q4_k_xl", "m-UD-Q4_K_XL.gguf"),
        (":UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
        (":m-q8_0", "d/m-Q8_0.gguf"),
        ("/d/m-Q8_0.gguf", "d/m-Q8_0.gguf"),
        ("/M-q8_0.GGUF", "d/m-Q8_0.gguf"),
        ("/mmproj-f16.gguf", "mmproj-f16.gguf"),
    ],
)
def test_the_choice_by_a_wish(wish: str, chosen: str) -> None:
    there = variants_of("m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "d/m-Q8_0.gguf", "mmproj-f16.gguf")
    assert choose(parse_reference(f"hf:org/r{wish}"), there)[0].path == chosen


def test_what_is_not_there_is_answered_with_what_is() -> None:
    there = variants_of("m-Q4_K_M.gguf", "m-Q8_0.gguf")
    with pytest.raises(ModelNotFoundError) as error:
        choose(parse_reference("hf:org/r:Q4_K_S"), there)
    assert str(error.value) == (
        "hf:org/r has no Q4_K_S; did you mean Q4_K_M? There is Q4_K_M (100 B), Q8_0 (101 B)"
    )
    with pytest.raises(ModelNotFoundError, match=r"did you mean hf:org/r/m-Q8_0.gguf"):
        choose(parse_reference("hf:org/r/m-q8.gguf"), there)


def test_two_that_fit_are_named() -> None:
    there = variants_of("a-Q4_K_M.gguf", "b-Q4_K_M.gguf")
    for wish in ("", ":Q4_K_M"):
        with pytest.raises(UsageError, match=r"can mean 2 models.*hf:org/r/a-Q4_K_M.gguf \(100 B\)"):
            choose(parse_reference(f"hf:org/r{wish}"), there)
