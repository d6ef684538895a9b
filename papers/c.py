"""Paper C: learned, frozen and random routers.

Fan, Messmer, Jaggi 2024, arXiv 2402.13089.
"""

from papers.measures import LOSSES
from papers.table import ABOVE_0, Claim, Reading, Row, Table, View

SOURCE = "C: Fan, Messmer, Jaggi 2024, arXiv 2402.13089"

TABLES = (
    Table(
        name="C",
        title="Learned, frozen and random routers",
        source=SOURCE,
        text="4 experts, top-1, routed by token. C's own perplexities (frozen / learned / drawn anew each step) "
        "are 9.810 / 9.907 / 11.752 on multilingual text and 22.687 / 22.632 / 26.879 on OpenWebText: other models "
        "on other data, so only the direction compares.",
        rows=(
            Row("shakespeare_moe4", "learned"),
            Row("shakespeare_moe4_frozen", "frozen", baseline="shakespeare_moe4"),
            Row("shakespeare_moe4_random", "random", baseline="shakespeare_moe4"),
        ),
        views=(View("Loss", LOSSES), View("Routing", ("load_cv2", "entropy", "train_seconds"))),
        figures=("loss_curves", "load_over_training"),
    ),
)

CLAIMS = (
    Claim(
        id="C1",
        sentence="A frozen random router is about as good as a learned one.",
        table="C",
        pairs=(("shakespeare_moe4_frozen", "shakespeare_moe4"),),
        holds=(-0.02, 0.02),
        why="twice the larger of C's two differences, 0.0098 nats per token, with a character for a token",
        other_reading=Reading((-0.005, 0.005), "the same margin per token of 4 characters, as in English text"),
    ),
    Claim(
        id="C2",
        sentence="A router drawn anew each step is worse than a learned one.",
        table="C",
        pairs=(("shakespeare_moe4_random", "shakespeare_moe4"),),
        holds=ABOVE_0,
    ),
    Claim(
        id="C3",
        sentence="Routed by token, experts specialise by syntax and not by topic.",
        table="experts",
        pairs=(("shakespeare_moe4", ""),),
        measures=("syntax_over_topic", "syntax_above_frozen"),
        holds=ABOVE_0,
        why="given the character, its place in the word or line tells more about the expert than speaker, play or "
        "passage do; by the second measure, more than it tells about a random router's expert",
    ),
    Claim(
        id="C4",
        sentence="Routed by sequence, experts specialise by topic more than routed by token.",
        table="experts",
        pairs=(("shakespeare_moe4_sequence", "shakespeare_moe4"),),
        measures=("topic_of_rest", "topic", "topic_above_frozen"),
        holds=ABOVE_0,
        why="speaker, play or passage tell a larger share of what the character leaves open",
    ),
    Claim(
        id="C5",
        sentence="A frozen router specialises as much as a learned one.",
        table="experts",
        pairs=(("shakespeare_moe4_frozen", "shakespeare_moe4"),),
        measures=("about_character",),
        holds=(-0.02, 0.02),
        why="our reading of “learned routing may not be essential”. The margin is that below which D5 calls routing "
        "random. It was a tenth of H(expert), more than a learned router has over a random one (0.07)",
    ),
)
