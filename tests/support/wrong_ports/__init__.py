"""A port of its own, written from the specification's text alone, with a knob for each decision.

It shares no code with `nsq_ref` but the scheme, works on one sequence at a time, and takes other
ways to the exact results: integers and fractions. With default knobs it conforms; each knob that is
set makes one mistake. The kit's own table of mistakes is not used: strangers judge the kit.
"""

from tests.support.wrong_ports.knobs import RIGHT, Knobs
from tests.support.wrong_ports.port import Port

__all__ = ["RIGHT", "Knobs", "Port"]
