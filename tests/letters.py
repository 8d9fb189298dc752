"""How small the letters of a figure are where it is read: on a page that leaves it seven inches."""
from matplotlib.figure import Figure
from matplotlib.text import Text

PAGE, SMALLEST = 7.0, 7.95  # inches; points, with something for rounding


def letters(figure: Figure) -> dict[str, float]:
    """What is written in a figure → its size in points, after a figure wider than the page is reduced to it."""
    figure.draw_without_rendering()
    scale = min(1, PAGE / figure.get_tightbbox().width)
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return {text.get_text(): text.get_size() * scale for text in shown}
