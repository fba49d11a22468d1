"""The small world of the demo's tasks: the facts its prompts ask about, shared by the generator and the verifier."""

from __future__ import annotations

LEADS = ("first", "then", "finally")  # the words that open the parts of a response told in order
NAMES = ("anna", "ben", "dan", "eva", "ida", "kim", "leo", "max", "mia", "sam", "tom", "zoe")

# list: what a category holds, with the color of each
COLORS: dict[str, dict[str, str]] = {
    category: dict(item.split() for item in held.split(", "))
    for category, held in {
        "fruits": "apple red, banana yellow, cherry red, fig purple, grape purple, kiwi brown, "
        "lemon yellow, lime green, mango orange, peach pink, pear green, plum purple",
        "vegetables": "bean green, beet purple, carrot orange, corn yellow, garlic white, kale green, "
        "leek green, onion white, pea green, pepper red, potato brown, radish red",
        "flowers": "aster purple, clover white, daisy white, iris blue, jasmine white, lilac purple, "
        "lily white, lotus pink, orchid pink, poppy red, rose red, tulip yellow",
        "stones": "agate brown, amber orange, coral pink, garnet red, jade green, jet black, "
        "onyx black, opal white, pearl white, ruby red, slate gray, topaz yellow",
        "birds": "crow black, dove white, eagle brown, finch yellow, gull gray, heron gray, "
        "jay blue, parrot green, raven black, robin red, swan white, wren brown",
    }.items()
}

# plan: what a person does, in the order of the working day
STEPS: dict[str, list[str]] = {
    role: steps.split(", ")
    for role, steps in {
        "baker": "weigh the flour, mix the dough, heat the oven, roll the dough, cut the dough, "
        "bake the bread, cool the bread, pack the bread, sell the bread, clean the oven",
        "driver": "wash the bus, fill the tank, check the map, start the engine, open the door, "
        "greet the people, close the door, drive the bus, park the bus, count the money",
        "farmer": "open the barn, feed the hens, milk the cow, clean the barn, plant the corn, "
        "water the field, pick the beans, load the cart, sell the beans, lock the barn",
        "gardener": "open the gate, dig the hole, plant the tree, water the tree, cut the grass, "
        "pick the roses, fill the vase, sweep the path, close the gate, hide the key",
        "nurse": "wash the hands, read the file, greet the man, check the heart, clean the arm, "
        "wrap the arm, write the note, give the pills, call the doctor, make the bed",
        "painter": "clean the wall, cover the floor, open the paint, mix the paint, wet the brush, "
        "paint the wall, wash the brush, hang the picture, sweep the floor, send the bill",
        "sailor": "check the map, load the ship, raise the anchor, set the sail, leave the port, "
        "watch the sea, turn the ship, drop the anchor, tie the rope, clean the deck",
        "teacher": "open the room, clean the board, greet the class, read the list, tell the story, "
        "ask the question, check the answers, thank the class, give the books, lock the room",
    }.items()
}

# describe: how an attribute is told, and what is true of each animal, in the attributes' order
SENTENCES: dict[str, str] = {
    "color": "its color is {}",
    "size": "it is a {} animal",
    "home": "it lives in the {}",
    "food": "it likes to eat {}",
    "legs": "it has {} legs",
    "skin": "it is covered in {}",
    "hours": "it is awake by {}",
    "pace": "it moves at a {} pace",
    "baby": "its baby is a {}",
}
ANIMALS: dict[str, str] = {
    "bat": "black small forest fruit 2 fur night fast pup",
    "bear": "brown huge forest fruit 4 fur day slow cub",
    "camel": "brown big desert grass 4 hair day slow calf",
    "cat": "gray small house fish 4 fur night fast kitten",
    "cow": "white big farm grass 4 hair day slow calf",
    "deer": "brown big forest leaves 4 hair day fast fawn",
    "dog": "brown small house meat 4 fur day fast pup",
    "fox": "red small forest meat 4 fur night fast cub",
    "goat": "white small farm leaves 4 hair day slow kid",
    "hen": "red small farm seeds 2 feathers day slow chick",
    "horse": "brown big farm grass 4 hair day fast foal",
    "lion": "yellow big desert meat 4 fur night fast cub",
    "mole": "black small field worms 4 fur night slow pup",
    "mouse": "gray small house seeds 4 fur night fast pup",
    "owl": "brown small forest meat 2 feathers night fast chick",
    "penguin": "black small sea fish 2 feathers day slow chick",
    "rabbit": "gray small field grass 4 fur day fast kitten",
    "seal": "gray big sea fish 0 fur day fast pup",
    "shark": "gray big sea fish 0 scales night fast pup",
    "sheep": "white big field grass 4 wool day slow lamb",
    "tiger": "orange big forest meat 4 fur night fast cub",
    "whale": "blue huge sea fish 0 skin day slow calf",
    "wolf": "gray big forest meat 4 fur night fast pup",
    "zebra": "black big field grass 4 hair day fast foal",
}

# math: what is counted, and what adds to it or takes from it
THINGS = ("apples", "balls", "books", "cards", "coins", "cups", "eggs", "hats", "pens", "shells")
GAINS = ("buys", "finds", "gets")
LOSSES = ("drops", "loses", "sells")


def leads(count: int) -> list[str]:
    """The leads of so many parts, shared by who writes and who checks them: first, then, ..., then, finally."""
    first, then, finally_ = LEADS
    return [first, *[then] * (count - 2), finally_]


def facts(animal: str) -> dict[str, str]:
    """Each attribute's true sentence about an animal, so that a description can be written and checked."""
    told = zip(SENTENCES.items(), ANIMALS[animal].split(), strict=True)
    return {attribute: sentence.format(value) for (attribute, sentence), value in told}


def change(verb: str, amount: int) -> str:
    """How a gain or a loss is told, so that the problem and its solution say it alike."""
    return f"{verb} {amount} more" if verb in GAINS else f"{verb} {amount} of them"
