"""Colours that the terminal, the pictures and the HTML page share."""

PAPER, PAPER_ON_DARK = "#ffffff", "#14171a"  # background of pictures and of the report, in light and in dark mode

# Okabe and Ito (2008): colours that colour-blind readers can tell apart.
ORANGE, SKY, GREEN, VERMILION, PURPLE, BLUE = "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2"

# Backgrounds of experts under black text. With more experts than colours, the colours repeat.
EXPERT_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#bbbbbb")
