import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.presets import MAX_DESCRIPTION, Preset, PresetError, read


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "presets.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def test_objects_lists_and_descriptions(write):
    presets = read(
        write(
            """
            [presets.calm]
            description = "less of it"
            method = "zerotuning"
            gamma = 0.5
            heads = { 1 = [0, 2] }

            [presets."v1.5"]
            calibrations = [{ method = "act" }, { method = "zerotuning", gamma = 2 }]
            """
        )
    )
    calm = {"method": "zerotuning", "gamma": 0.5, "heads": {"1": [0, 2]}}
    both = [{"method": "act"}, {"method": "zerotuning", "gamma": 2}]
    assert presets == {
        "calm": Preset("calm", calm, "less of it"),
        "v1.5": Preset("v1.5", both),
    }
    assert list(presets) == ["calm", "v1.5"]


@pytest.mark.parametrize("text", ["", "[presets]"])
def test_a_file_without_any(write, text):
    assert read(write(text)) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "presets.toml: only tables [presets.NAME] go here, not 'x'"),
        ("presets = 1", "presets must be tables"),
        ("[presets.a", "presets.toml is not TOML"),
        ("[presets.a]\nx = 1\nx = 2", "presets.toml is not TOML"),
        (b"\xff", "presets.toml is not TOML"),
        ("a = " + "[" * 5000, "presets.toml is not TOML"),
        ("[presets]\na = 1", "preset 'a': it must be a table"),
        ("[presets.none]", "preset 'none': the name is reserved"),
        ("[presets.Calm]", "preset 'Calm': a name must match"),
        ('[presets."a:b"]', "preset 'a:b': a name must match"),
        ("[presets.a]\ndescription = 1", "preset 'a': description must be a text"),
        (f"[presets.a]\ndescription = '{'x' * 1001}'", f"at most {MAX_DESCRIPTION} letters"),
        ("[presets.a]\ncalibrations = {}", "preset 'a': calibrations must be a list"),
        ("[presets.a]\ncalibrations = ['act']", "preset 'a': calibrations must be a list"),
        ("[presets.a]\ncalibrations = []\nmethod = 'act'", "method goes into an entry"),
    ],
)
def test_what_is_no_preset_is_named(write, tmp_path, text, said):
    with pytest.raises(PresetError) as caught:
        read(write(text))
    assert said in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PresetError, match=r"^presets\.toml cannot be read: No such file"):
        read(tmp_path / "presets.toml")


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("presets") / "presets.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        assert all(preset.name == name for name, preset in read(path).items())
    except PresetError as error:
        assert str(path.parent) not in str(error)
