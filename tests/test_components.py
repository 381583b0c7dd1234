import pytest

from rlnas_fast.components import COMPONENTS, check_options, find
from rlnas_fast.errors import ConfigError


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown space 'chain-cn': did you mean 'chain-cnn'"):
        find("space", "chain-cn")


@pytest.mark.parametrize("name", ["no_such_module:Thing", "json:no_such_thing"])
def test_a_name_that_cannot_be_imported_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        find("space", name)


@pytest.mark.parametrize("name", [":Thing", ".relative:Thing", "a..b:Thing", "a path:Thing"])
def test_what_cannot_be_a_name_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match="module:attribute"):
        find("space", name)


def test_options_are_checked_against_the_signature() -> None:
    def factory(space: str, *, seed: int, rate: float = 0.1, size: int = 3) -> None: ...

    checked = check_options("strategy 'x'", factory, {"rate": "0.5"}, skip=1, fixed={"seed": 0})
    assert checked == {"rate": 0.5}
    with pytest.raises(ConfigError, match="did you mean 'rate'"):
        check_options("strategy 'x'", factory, {"rat": 1}, skip=1, fixed={"seed": 0})
    with pytest.raises(ConfigError, match="size = 'big'"):
        check_options("strategy 'x'", factory, {"size": "big"}, skip=1, fixed={"seed": 0})
    with pytest.raises(ConfigError, match="needs the option 'seed'"):
        check_options("strategy 'x'", factory, {}, skip=1)


def test_every_component_can_be_imported_and_says_what_it_is() -> None:
    for kind, names in COMPONENTS.items():
        for name in names:
            factory = find(kind, name)
            assert callable(factory)
            assert (factory.__doc__ or "").strip(), f"{kind} {name} has no docstring"
