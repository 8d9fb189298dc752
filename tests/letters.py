"""How small the letters of a figure are where it is read: on a page that leaves it seven inches."""
import warnings

from matplotlib.figure import Figure
from matplotlib.text import Text

PAGE = 7.0  # inches
SMALLEST = 8.0  # points


def letters(figure: Figure) -> dict[str, float]:
    """What is written in a figure → its size in points, after a figure wider than the page is reduced to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.draw_without_rendering()
        width = figure.get_tightbbox().width
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {text.get_text(): round(text.get_size() * min(1, PAGE / width), 2) for text in shown}
