"""Table 2 of the paper as it is printed, the four levels of CIFAR-100, one coarse class a line."""

TABLE_2 = """
animals | large animals | reptiles | crocodile, dinosaur, lizard, snake, turtle
animals | large animals | large carnivores | bear, leopard, lion, tiger, wolf
animals | large animals | large omnivores and herbivores | camel, cattle, chimpanzee, elephant, kangaroo
animals | medium animals | aquatic mammals | beaver, dolphin, otter, seal, whale
animals | medium animals | medium-sized mammals | fox, porcupine, possum, raccoon, skunk
animals | small animals | small mammals | hamster, mouse, rabbit, shrew, squirrel
animals | small animals | fish | aquarium fish, flatfish, ray, shark, trout
animals | invertebrates | insects | bee, beetle, butterfly, caterpillar, cockroach
animals | invertebrates | non-insect invertebrates | crab, lobster, snail, spider, worm
animals | people | people | baby, boy, girl, man, woman
vegetations | vegetations | flowers | orchids, poppies, roses, sunflowers, tulips
vegetations | vegetations | fruit and vegetables | apples, mushrooms, oranges, pears, peppers
vegetations | vegetations | trees | maple, oak, palm, pine, willow
objects and scenes | household objects | food containers | bottles, bowls, cans, cups, plates
objects and scenes | household objects | household electrical devices | clock, keyboard, lamp, telephone, television
objects and scenes | household objects | household furniture | bed, chair, couch, table, wardrobe
objects and scenes | construction | large man-made outdoor things | bridge, castle, house, road, skyscraper
objects and scenes | natural scenes | large natural outdoor scenes | cloud, forest, mountain, plain, sea
objects and scenes | vehicles | vehicles 1 | bicycle, bus, motorcycle, pickup truck, train
objects and scenes | vehicles | vehicles 2 | lawn-mower, rocket, streetcar, tank, tractor
"""
# Where CIFAR-100 does not merely write "_" for a space.
OFFICIAL = {
    "medium-sized mammals": "medium_mammals",
    **{"orchids": "orchid", "poppies": "poppy", "roses": "rose", "sunflowers": "sunflower", "tulips": "tulip"},
    **{"apples": "apple", "mushrooms": "mushroom", "oranges": "orange", "pears": "pear", "peppers": "sweet_pepper"},
    **{"maple": "maple_tree", "oak": "oak_tree", "palm": "palm_tree", "pine": "pine_tree", "willow": "willow_tree"},
    **{"bottles": "bottle", "bowls": "bowl", "cans": "can", "cups": "cup", "plates": "plate"},
    "lawn-mower": "lawn_mower",
}


def read_table(text):
    """The 100 paths (level-0 name, ..., level-3 name) from the root to a fine class, in official spelling."""
    paths = []
    for line in text.strip().splitlines():
        *upper, fines = line.split(" | ")
        paths += [[*upper, fine] for fine in fines.split(", ")]
    return [tuple(OFFICIAL.get(name, name.replace(" ", "_")) for name in path) for path in paths]


PATHS = read_table(TABLE_2)
NAMES = [
    ["animals", "vegetations", "objects_and_scenes"],
    [
        *["large_animals", "medium_animals", "small_animals", "invertebrates", "people", "vegetations"],
        *["household_objects", "construction", "natural_scenes", "vehicles"],
    ],
    sorted({path[2] for path in PATHS}),
    sorted({path[3] for path in PATHS}),
]
PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
