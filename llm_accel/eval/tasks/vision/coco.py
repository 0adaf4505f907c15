"""Objects that a caption names: the 80 categories of COCO with the words people use for them.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) matches captions against such a list. This one is our own and shorter
than theirs, so figures are comparable with each other and not with published ones.
"""

from __future__ import annotations

import re
from functools import cache

# category: words for it; regular plurals are added
_WORDS = """
person: man, men, woman, women, people, boy, girl, child, children, kid, baby, toddler, lady, guy, player, skier,
 snowboarder, surfer, rider, pedestrian, passenger, spectator, skateboarder, batter, catcher, chef, officer
bicycle: bike
car: automobile, sedan, taxi, cab, suv, van, minivan, jeep, hatchback, police car
motorcycle: motorbike, scooter, moped, dirt bike, motor bike
airplane: plane, aeroplane, jet, aircraft, jetliner, airliner, biplane
bus: minibus, school bus, double decker
train: locomotive, tram, subway, passenger train, railcar, caboose
truck: pickup, lorry, fire engine, firetruck, fire truck, pickup truck
boat: ship, canoe, kayak, sailboat, ferry, yacht, rowboat, gondola, raft, vessel
traffic light: stoplight, traffic signal, stop light, street light signal
fire hydrant: hydrant
stop sign: stopsign
parking meter: meter
bench: pew, park bench
bird: duck, pigeon, seagull, gull, goose, geese, owl, parrot, swan, eagle, crow, ostrich, flamingo, sparrow, penguin,
 pelican, robin
cat: kitten, kitty
dog: puppy, puppies, pup, beagle, poodle, bulldog, terrier, labrador, dachshund, corgi
horse: pony, ponies, foal, stallion, mare, colt
sheep: lamb, ewe
cow: cattle, bull, calf, calves, ox, oxen
elephant:
bear: polar bear, grizzly, grizzly bear, black bear, panda
zebra:
giraffe:
backpack: rucksack, knapsack
umbrella: parasol
handbag: purse, tote bag
tie: necktie, bow tie, bowtie
suitcase: luggage, briefcase
frisbee: flying disc
skis: ski, pair of skis
snowboard:
sports ball: ball, baseball, soccer ball, tennis ball, basketball, football, volleyball
kite:
baseball bat: bat
baseball glove: baseball mitt, catcher's mitt, mitt
skateboard: skate board, longboard
surfboard: surf board, paddleboard
tennis racket: racket, racquet, tennis racquet
bottle: wine bottle, beer bottle, water bottle
wine glass: wineglass, goblet, champagne glass
cup: mug, teacup, coffee cup
fork:
knife: knives, butter knife
spoon: teaspoon, ladle
bowl:
banana:
apple:
sandwich: burger, hamburger, cheeseburger, panini
orange: tangerine, clementine
broccoli:
carrot: baby carrot
hot dog: hotdog, bratwurst
pizza: pizza slice
donut: doughnut
cake: cupcake, cheesecake, birthday cake
chair: armchair, stool, recliner, rocking chair, folding chair, lawn chair
couch: sofa, loveseat, futon
potted plant: houseplant, house plant, pot plant
bed: mattress, bunk bed
dining table: table, desk, dinner table, kitchen table, coffee table
toilet: urinal, commode
tv: television, tv set, flat screen, television set, flatscreen
laptop: notebook computer, laptop computer, macbook
mouse: mice, computer mouse
remote: remote control, wii remote, game controller
keyboard: computer keyboard
cell phone: phone, cellphone, smartphone, mobile phone, iphone, telephone
microwave: microwave oven
oven: stove, stovetop, stove top oven
toaster: toaster oven
sink: washbasin, wash basin
refrigerator: fridge, freezer
book: novel, textbook
clock: clock tower, alarm clock
vase: flower vase
scissors: pair of scissors, shears
teddy bear: teddy, stuffed bear, toy bear
hair drier: hair dryer, hairdryer, blow dryer
toothbrush: tooth brush
"""
# where such a word means something else, or is the first of two that mean one thing
_OTHERS = (
    r"(?:baby|mother|adult) (?=elephant|giraffe|zebra|bear|bird|cow|calf|horse|sheep|goat|duck)",
    r"orange (?!and\b|on\b|in\b|is\b|are\b|next\b|beside\b|with\b)(?=[a-z])",
    r"(?:orange|apple) (?:juice|pie|tree)s?",
    r"(?:train|bus|fire|gas|police) (?:track|station|stop|depot|platform)s?",
    r"(?:dog|cat|bird) (?:food|house|bowl|bed|bath|cage|park)s?",
    r"ski (?:slope|lift|pole|resort|mask|jump|run|suit|boot|goggle)s?",
    r"(?:table|tennis|car|boat|ball) (?:cloth|tennis|court|park|match|game|player|house|ride)s?",
    r"(?:bed|bath) ?rooms?|bed ?spreads?|book ?shel\w+|chair lifts?|carrot cakes?|pizza (?:boxe|box|oven|cutter)s?",
)


def categories() -> tuple[str, ...]:
    """The 80 names, in COCO's order."""
    return tuple(dict.fromkeys(_words().values()))


def objects_in(text: str) -> list[str]:
    """Categories named in a text, in order and with repetitions; where several words fit, the longest one counts."""
    words = _words()
    return [words[match["word"]] for match in _pattern().finditer(text.lower()) if match["word"]]


@cache
def _words() -> dict[str, str]:
    """Word or phrase, singular or plural -> category."""
    found: dict[str, str] = {}
    for line in _WORDS.replace("\n ", " ").strip().splitlines():
        category, _, others = line.partition(":")
        for word in (category, *filter(None, (other.strip() for other in others.split(",")))):
            found[word] = category
            found.setdefault(_plural(word), category)
    return found


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted(map(re.escape, _words()), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(_OTHERS)}|(?P<word>{'|'.join(longest_first)})\b)")


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2] not in "aeou":
        return f"{word[:-1]}ies"
    return f"{word}s"
