"""The colours of experts, on a terminal and on pages."""

# Backgrounds for black text that colour-blind readers can tell apart (Okabe and Ito 2008). With more experts than
# colours, the colours repeat.
EXPERT_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#bbbbbb")
