"""Colours that several places share: of experts, on a terminal, in pictures and on pages."""

# Backgrounds of experts under black text, that colour-blind readers can tell apart (Okabe and Ito 2008); more experts
# than colours repeat them.
EXPERT_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#bbbbbb")
