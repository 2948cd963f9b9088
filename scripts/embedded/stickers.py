"""The 150 stickers of the world: a name that captions say, its emoji, and its natural colour word where there is an obvious one.

The first 12 are those of the stage "stickers". Pictures come from Noto Color Emoji (SIL OFL 1.1), which is read from the machine and never shipped.
"""

_TABLE = """
apple 🍎 red, cat 🐱, tree 🌳 green, car 🚗 red, house 🏠, rocket 🚀, sun 🌞 yellow, pizza 🍕, frog 🐸 green, ghost 👻 white,
banana 🍌 yellow, fish 🐟 blue, dog 🐶, mouse 🐭 gray, hamster 🐹, rabbit 🐰, fox 🦊 orange, bear 🐻 brown, panda 🐼,
koala 🐨 gray, tiger 🐯 orange, lion 🦁, cow 🐮, pig 🐷 pink, monkey 🐵 brown, chicken 🐔, penguin 🐧, chick 🐤 yellow,
duck 🦆, owl 🦉 brown, bat 🦇, wolf 🐺 gray, horse 🐴 brown, unicorn 🦄, bee 🐝, caterpillar 🐛 green, butterfly 🦋, snail 🐌,
ladybug 🐞 red, spider 🕷, turtle 🐢 green, snake 🐍 green, dinosaur 🦕 green, octopus 🐙, squid 🦑, shrimp 🦐, crab 🦀 red,
pufferfish 🐡, dolphin 🐬 blue, whale 🐳 blue, shark 🦈, crocodile 🐊 green, elephant 🐘 gray, camel 🐫, giraffe 🦒,
kangaroo 🦘, sheep 🐑, goat 🐐, deer 🦌, parrot 🦜, swan 🦢 white, flamingo 🦩 pink, hedgehog 🦔, sloth 🦥, otter 🦦,
cactus 🌵 green, palm tree 🌴, pine tree 🌲 green, clover 🍀 green, maple leaf 🍁, mushroom 🍄, tulip 🌷, rose 🌹 red,
sunflower 🌻 yellow, blossom 🌸 pink, pear 🍐 green, tangerine 🍊 orange, lemon 🍋 yellow, watermelon 🍉, grapes 🍇 purple,
strawberry 🍓 red, cherries 🍒 red, peach 🍑, pineapple 🍍, coconut 🥥, kiwi 🥝, tomato 🍅 red, eggplant 🍆 purple,
avocado 🥑, broccoli 🥦 green, cucumber 🥒 green, corn 🌽 yellow, carrot 🥕 orange, potato 🥔, bread 🍞, croissant 🥐,
pretzel 🥨 brown, cheese 🧀 yellow, egg 🥚, pancakes 🥞, hamburger 🍔, fries 🍟, hot dog 🌭, taco 🌮, sushi 🍣, ice cream 🍦,
donut 🍩, cookie 🍪 brown, cake 🍰, cupcake 🧁, lollipop 🍭, teapot 🫖, cup 🍵, basketball 🏀 orange, tennis ball 🎾, die 🎲,
guitar 🎸, violin 🎻, trumpet 🎺, drum 🥁, bus 🚌, taxi 🚕 yellow, tractor 🚜, fire engine 🚒 red, ambulance 🚑, bicycle 🚲,
train 🚂, helicopter 🚁, sailboat ⛵, anchor ⚓, ufo 🛸, castle 🏰, tent ⛺, lighthouse 🗼, clock ⏰, umbrella ☂ purple,
snowman ⛄ white, fire 🔥, rainbow 🌈, balloon 🎈 red, gift 🎁, key 🔑, book 📕 red, crown 👑, hat 🎩 black, shoe 👟, robot 🤖,
alien 👽, pumpkin 🎃 orange, skull 💀 white
"""


def _parse(table: str) -> tuple[dict[str, str], dict[str, str]]:
    glyphs: dict[str, str] = {}
    natural: dict[str, str] = {}
    for entry in table.replace("\n", " ").split(","):
        words = entry.split()
        at = next(i for i, word in enumerate(words) if not word.isascii())
        name = " ".join(words[:at])
        glyphs[name] = words[at]
        if at + 1 < len(words):
            natural[name] = words[at + 1]
    return glyphs, natural


GLYPHS, NATURAL_COLOUR = _parse(_TABLE)
STICKERS: tuple[str, ...] = tuple(GLYPHS)
FLAG = "flag"  # not one of them: what the fine-tune example teaches
