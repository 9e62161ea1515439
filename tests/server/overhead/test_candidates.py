import pytest

from server.overhead.candidates import LeftOut, Offer
from tests.server.overhead.fake import TEXT_ONLY

pytestmark = pytest.mark.anyio
GAMMA = {"method": "zerotuning", "gamma": 0.5}


async def offered(connect, **options):
    _, api = await connect(**options)
    return await Offer.of(api)


async def test_a_text_model_takes_no_pictures(connect):
    offer = await offered(connect)

    assert not offer.pictures
    assert offer.usual(pictures=False) == (
        [GAMMA, "act"],
        [LeftOut("var", TEXT_ONLY), LeftOut("vhr", TEXT_ONLY)],
    )


async def test_a_parameter_without_a_default_has_the_example_of_its_schema(connect):
    chosen, _ = (await offered(connect)).usual(pictures=False)

    assert chosen[0] == GAMMA


async def test_with_pictures_every_method_can_be_asked_for(connect):
    offer = await offered(connect, vision=True)

    assert offer.pictures
    assert offer.usual(pictures=True) == ([GAMMA, "act", "var", "vhr"], [])


async def test_without_pictures_methods_that_need_them_are_left_out(connect):
    chosen, left_out = (await offered(connect, vision=True)).usual(pictures=False)

    assert chosen == [GAMMA, "act"]
    assert [each.calibrator for each in left_out] == ["var", "vhr"]
    assert "pictures" in left_out[0].reason
