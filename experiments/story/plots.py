"""The plots of the story grammar: templates in the small language that `grammar.py` expands.

`[a|b]` is a choice, `{slot}` a word of the story's world, `{Slot}` the same with a capital. A plot is a tuple of
paragraphs, a paragraph a tuple of beats, a beat a tuple of templates of which one is told. A plot's `rows` hold words
that belong together (a fear, what happens, what helps); one row is drawn and its entries become slots.
"""

from __future__ import annotations

from typing import NamedTuple

Beat = tuple[str, ...]


class Plot(NamedTuple):
    """One kind of story. `themes` are what a request calls it, `morals` what it teaches."""

    name: str
    themes: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    paragraphs: tuple[tuple[Beat, ...], ...]
    morals: tuple[str, ...]
    friend: bool = True
    """The hero's friend takes part, so the opening brings the friend in."""
    topics: tuple[str, ...] = ()
    """Slots that a request may fix, beside the hero and the place."""


OPENINGS: Beat = (
    "Once upon a time, there was a {adj} {kind} named {hero} who lived {where}.",
    "Once upon a time, there was a {adj} {kind} named {hero} who lived {where}.",
    "Once upon a time, there was a {adj} {kind} named {hero}. {He} lived {where}.",
    "Once upon a time, there was a {kind} named {hero}. {Hero} lived {where}.",
    "Once upon a time, {where}, there lived a {adj} {kind} named {hero}.",
    "Once upon a time, a {adj} {kind} [named|called] {hero} lived {where}.",
    "Once upon a time, there lived a {adj} {kind} {where}. {His} name was {hero}.",
    "Once upon a time, there lived a {adj} {kind} named {hero} {where}.",
    "Once upon a time, [beyond the hills|behind the mountains], there lived a {adj} {kind} named {hero}.",
    "Once upon a time, {hero} the {kind} lived in a [small|cosy|little|tiny] house {where}.",
    "Long ago, there was a {adj} {kind} named {hero} who lived {where}.",
    "Long, long ago, {where}, there lived a {kind} whose name was {hero}.",
    "There once was a {adj} {kind} named {hero} who lived {where}.",
    "There was once a {adj} {kind} who lived {where}. {His} name was {hero}.",
    "{Where}, there lived a {adj} {kind} named {hero}.",
    "{Where} lived a {adj} {kind} called {hero}.",
    "{Hero} was a {adj} {kind} who lived {where}.",
    "{Hero} and {his} {giver} lived {where}. {Hero} was a {adj} {kind}.",
    "A {adj} {kind} lived {where}. {His} name was {hero}.",
    "One day, a {adj} {kind} named {hero} [woke up early|went for a walk|looked out of the window]. {He} lived {where}.",
    "It was a [cold|dark|quiet] [winter night|evening], and a {kind} named {hero} sat by the [fire|window]. {He} lived {where}.",
    "{In_place}, everyone knew {hero} the {kind}.",
    "{Hero} the {kind} lived {where}.",
    "This is the story of {hero}, a {adj} {kind} who lived {where}.",
    "Far away, [beyond the hills|beyond the river|behind the mountains], a {adj} {kind} named {hero} lived {where}.",
    "Many years ago, a {adj} {kind} named {hero} lived {where}.",
    "The {adj} {kind} lived {where}. {His} name was {hero}.",
    "In a time [when animals could talk|of kings and dragons|long before ours], a {kind} named {hero} lived {where}.",
)

ENDINGS: Beat = (
    "",
    "",
    "And {hero} lived happily ever after.",
    "From that day on, {hero} was never [sad|lonely] again.",
    "That night, {hero} fell asleep with a smile.",
    "And if you ever come to {place}, you may still [see|meet|hear] {him} there.",
    "And so the day ended [well|happily], and the stars came out over {place}.",
    "{Hero} went home, tired and happy.",
    "It was the best day of {his} life.",
    "The end.",
)

PLOTS: tuple[Plot, ...] = (
    Plot(
        "lost",
        ("losing something", "looking for something", "helping a friend", "helping each other"),
        (
            {"thief": "A little bird had used it as a bed", "found": "was fast asleep in it"},
            {"thief": "The wind had carried it away", "found": "was waiting there all the time"},
            {"thief": "A young magpie had taken it", "found": "was lying in her nest"},
            {"thief": "The rain had washed it away", "found": "was wet, but it was not broken"},
        ),
        (
            (
                ("{His} [favourite thing|greatest treasure] was a {thing}, a gift from {his} {giver}.",
                 "For {his} birthday, {his} {giver} gave {him} a {thing}. {Hero} took it everywhere.",
                 "{He} had a {thing} that {he} loved more than anything else."),
                ("But {morning}, the {noun} was gone.",
                 "{Morning}, {hero} woke up and could not find the {noun}.",
                 "{Morning}, {he} looked for the {noun}, but it was gone."),
            ),
            (
                ("{He} looked {spot}, but it was not there.",
                 "{He} ran to look {spot}, but there was nothing."),
                ("{He} looked {spot2}, but it was not there either.",
                 "{He} searched {spot2}, but all {he} found was [a leaf|a feather|an old shoe]."),
                ("\"Where is my {noun}?\" {he} cried.",
                 "Then {he} sat down and began to cry."),
            ),
            (
                ("\"Why are you so sad?\" asked {friend}.",
                 "{Friend} came along and asked, \"What is the matter, {hero}?\""),
                ("\"I have lost my {thing},\" said {hero}. \"I have looked everywhere.\"",
                 "\"My {thing} is gone,\" said {hero}."),
                ("\"Do not worry,\" said {friend}. \"[We will look for it together|Four eyes see more than two].\"",
                 "\"Then I will help you,\" said {friend}. \"Two can see more than one.\""),
            ),
            (
                ("They looked high and low until the sun went down.",
                 "They asked everyone {in_place}, but nobody had seen it.",
                 "They looked under every stone and behind every tree."),
                ("At last, {friend} saw something {spot3}.",
                 "Then {friend} looked {spot3}. \"Come quickly, {hero}!\" {fhe} called."),
                ("It was the {noun}! {Thief}. The {noun} was [cold|a little dirty], but {hero} did not mind.",
                 "{Thief}. \"My {noun}!\" cried {hero}."),
                ("{Hero} [hugged {friend}|danced for joy]. \"Thank you,\" {he} said. \"You are a true friend.\"",
                 "\"Thank you, {friend},\" said {hero}. \"Without you I would never have found it.\""),
            ),
        ),
        ("A good friend is worth more than any treasure.", "Together we find what we cannot find alone."),
        topics=("thing", "friend"),
    ),
    Plot(
        "wish",
        ("learning something new", "never giving up", "a big dream", "trying again"),
        (
            {"wish": "swim", "trial": "jumped into the water, but {he} sank like a stone",
             "advice": "Breathe slowly and kick with your legs", "win": "swam all the way to the other side"},
            {"wish": "fly", "trial": "jumped from a rock and flapped, but {he} fell into a bush",
             "advice": "Build wings of paper and wait for the wind", "win": "sailed over the treetops"},
            {"wish": "sing", "trial": "opened {his} mouth, but only a squeak came out",
             "advice": "Listen to the birds first, and sing from your heart", "win": "sang so well that even the birds were quiet"},
            {"wish": "dance", "trial": "turned around twice and fell over {his} own feet",
             "advice": "Do not count your steps. Listen to the music", "win": "danced until the moon came up"},
            {"wish": "read", "trial": "opened a big book, but the letters looked like ants",
             "advice": "Start with one letter, and learn one more each day", "win": "read a whole story aloud"},
            {"wish": "paint", "trial": "painted a tree, but it looked like a broom",
             "advice": "Look at the tree for a long time before you paint it", "win": "painted the most beautiful tree of all"},
            {"wish": "climb to the top of the hill", "trial": "ran up as fast as {he} could, but soon {he} was out of breath",
             "advice": "Go slowly, and rest when you are tired", "win": "stood at the very top and saw the whole world"},
            {"wish": "bake bread", "trial": "put the dough into the oven, but it came out as hard as a stone",
             "advice": "Give the dough time to rest", "win": "baked a loaf that was golden and soft"},
            {"wish": "play the flute", "trial": "blew as hard as {he} could, but it sounded like an angry goose",
             "advice": "Blow softly, as if you were cooling your soup", "win": "played a song that made everyone smile"},
        ),
        (
            (
                ("But {hero} had one [great|big|secret] wish: {he} wanted to {wish}.",
                 "More than anything, {hero} wanted to {wish}.",
                 "All {hero} ever dreamed of was to {wish}."),
                ("\"You will never {wish},\" the others laughed.",
                 "\"A {kind} cannot {wish},\" everyone said.",
                 "\"Why would a {kind} want to {wish}?\" the others asked."),
            ),
            (
                ("{Morning}, {he} decided to try.", "{Morning}, {hero} said, \"Today I will try!\""),
                ("{He} {trial}.",),
                ("{He} tried again, but it was no better.", "{Hero} was [sad|very unhappy] and wanted to give up."),
            ),
            (
                ("Then {he} met {an_elder}.", "That evening, {he} met {an_elder} {spot}."),
                ("\"Why do you look so sad?\" asked the {elder}.", "\"What is wrong, little one?\" the {elder} asked."),
                ("\"I want to {wish}, but I [cannot|do not know how],\" said {hero}.",),
                ("\"Nobody can do it on the first day,\" said the {elder}. \"{Advice}.\"",
                 "The {elder} smiled. \"{Advice},\" {ehe} said."),
            ),
            (
                ("So {hero} practised every day, in sun and in rain.",
                 "{Hero} listened well. {He} practised every morning and every evening.",
                 "Day after day, {hero} tried again."),
                ("[Then one day|At last], it happened. {He} {win}!",
                 "And one fine day, {he} {win}."),
                ("Everyone {in_place} clapped and cheered.",
                 "\"Look at {hero}!\" the others shouted, and nobody laughed any more.",
                 "The {elder} nodded and smiled."),
            ),
        ),
        ("If you keep trying, you can do great things.", "Never give up on your dreams.",
         "Everything is hard before it is easy."),
        friend=False,
        topics=("elder",),
    ),
    Plot(
        "fear",
        ("being brave", "being afraid", "courage"),
        (
            {"fear": "the dark", "event": "the lamp went out, and it was as dark as ink",
             "trouble": "had fallen into a deep hole", "deed": "walked into the dark, one step after another"},
            {"fear": "thunder", "event": "a great storm came, and the thunder rolled over the hills",
             "trouble": "was stuck under a fallen branch", "deed": "ran out into the storm"},
            {"fear": "deep water", "event": "the river rose and rose",
             "trouble": "was sitting on a tiny rock in the river", "deed": "jumped into the cold water"},
            {"fear": "high places", "event": "the wind began to blow very hard",
             "trouble": "was stuck at the top of a tall tree", "deed": "climbed up, branch by branch"},
            {"fear": "strangers", "event": "somebody knocked at the door",
             "trouble": "had hurt {fhis} foot and could not walk", "deed": "asked a stranger for help"},
            {"fear": "the cold wind", "event": "the snow fell all day and all night",
             "trouble": "was lost in the snow", "deed": "went out into the white wind"},
        ),
        (
            (
                ("There was only one thing that {hero} was afraid of, and that was {fear}.",
                 "But {hero} had a secret. {He} was afraid of {fear}.",
                 "{Hero} was never afraid, except of {fear}."),
                ("\"Everyone is afraid of something,\" {friend} always said.",
                 "Only {friend} knew about it.",
                 "When the others laughed at {him}, {friend} did not."),
            ),
            (
                ("{Evening}, {event}.",),
                ("{Hero} hid under {his} blanket and shook.", "{Hero} closed {his} eyes and held {his} breath."),
                ("Then {he} heard a voice. \"Help! Help!\" It was {friend}! {Fhe} {trouble}.",
                 "Suddenly, somebody called for help. It was {friend}, who {trouble}."),
            ),
            (
                ("{Hero}'s heart beat like a drum. \"I am afraid,\" {he} said, \"but {friend} needs me.\"",
                 "\"I cannot go,\" thought {hero}. \"But I cannot leave {friend} alone.\""),
                ("{He} took a deep breath and {deed}.",),
                ("\"I am coming!\" {he} shouted.", "\"Hold on, {friend}!\" {he} called. \"I am here!\""),
            ),
            (
                ("{Hero} took {friend} by the hand, and together they came home safely.",
                 "Soon {friend} was safe, and the two sat by the warm fire."),
                ("\"You were so brave,\" said {friend}.", "\"You saved me,\" said {friend}. \"You are a hero!\""),
                ("\"I was afraid all the time,\" said {hero}. \"That is what brave means,\" said {friend}.",
                 "{Hero} smiled. {He} was not so afraid of {fear} any more."),
            ),
        ),
        ("To be brave is to be afraid and to do it all the same.", "Love is stronger than fear."),
        topics=("friend",),
    ),
    Plot(
        "share",
        ("sharing", "being kind", "being selfish"),
        (
            {"cold": "Then the winter came, and the snow lay deep.", "none": "had nothing to eat"},
            {"cold": "Then the summer was dry, and nothing would grow.", "none": "was very hungry"},
            {"cold": "Then came a long, hard winter.", "none": "had only an empty bowl"},
            {"cold": "Then it rained for three weeks.", "none": "had lost everything"},
        ),
        (
            (
                ("{Hero} had [a big basket|a whole room|a cupboard] full of {food}.",
                 "Nobody {in_place} had as many {food} as {hero}."),
                ("{He} counted them every evening and never gave any away.",
                 "\"They are mine, all mine,\" {he} said.",
                 "{He} hid them {spot}, so that nobody could find them."),
                ("{Morning}, {friend} asked, \"May I have [one|just one], please?\" But {hero} said, \"No!\"",
                 "When {friend} asked for some, {hero} shook {his} head and closed the door."),
            ),
            (
                ("{Cold}",),
                ("{Friend} {none}.",),
                ("{Hero} sat alone at {his} table and ate {his} {food}. But they did not taste good.",
                 "{Hero} had enough to eat, but there was nobody to talk to. {He} felt very lonely."),
            ),
            (
                ("Through the window, {he} saw {friend} in the cold. \"What have I done?\" {he} thought.",
                 "\"What good are so many {food},\" {he} thought, \"when I must eat them alone?\""),
                ("So {hero} opened the door. \"Come in, {friend},\" {he} called. \"There is enough for two!\"",
                 "{He} filled a basket with {food} and carried it to {friend}. \"These are for you,\" {he} said."),
                ("\"Thank you, {hero},\" said {friend}, and {fhis} eyes were shining.",
                 "{Friend} could not believe it. \"For me?\" {fhe} asked. \"For us,\" said {hero}."),
            ),
            (
                ("They ate and laughed and told stories until late at night.",
                 "They sat by the fire and ate together."),
                ("Never had the {food} tasted so [good|sweet].",
                 "\"How strange,\" said {hero}. \"Now I have less, but I am happier.\""),
            ),
        ),
        ("Joy grows when you share it.", "The more you give, the richer you are.", "Sharing makes friends."),
        topics=("food", "friend"),
    ),
    Plot(
        "astray",
        ("getting lost", "finding the way home", "listening to your mother"),
        (
            {"lure": "a blue butterfly", "follow": "followed it over hills and through bushes"},
            {"lure": "a strange light", "follow": "walked towards it, but it moved further and further away"},
            {"lure": "a sweet smell of {food}", "follow": "followed {his} nose, further and further"},
            {"lure": "a path that {he} had never seen before", "follow": "wanted to know where it ended"},
            {"lure": "a tiny silver fish", "follow": "ran along the stream to watch it"},
        ),
        (
            (
                ("\"Do not go too far from home,\" {his} {parent} always said.",
                 "Every morning, {his} {parent} said, \"Come home before it is dark.\""),
                ("{Morning}, {hero} saw {lure}. {He} {follow}.",
                 "But {morning}, {he} saw {lure}. {Hero} {follow}."),
            ),
            (
                ("When {he} turned around, {he} did not know where {he} was.",
                 "Soon everything looked strange, and {hero} could not find the way back."),
                ("The sun went down, and it grew cold and dark.", "The shadows grew long. Somewhere, something howled."),
                ("\"I want to go home,\" said {hero}, and a tear ran down {his} nose.",
                 "{He} sat down {spot} and called, but nobody answered."),
            ),
            (
                ("Then a soft voice said, \"Who is crying here?\" It was {an_elder}.",
                 "\"What are you doing here so late?\" asked somebody. There stood {an_elder}."),
                ("\"I am {hero}, and I am lost,\" said the {kind}.",
                 "\"I have lost my way,\" said {hero}. \"I live {where}.\""),
                ("\"Do you see that bright star?\" said the {elder}. \"It stands right above {place}. Come, I will go with you.\"",
                 "\"I know the way,\" said the {elder}. \"Take my hand and do not be afraid.\""),
            ),
            (
                ("They walked [for a long time|through the night|side by side], and the {elder} told {him} [stories|about the stars].",
                 "The {elder} held up a lantern, and they went on step by step."),
                ("At last, {hero} saw the light of {his} own house.", "And then {he} heard {his} {parent} calling {his} name."),
                ("{His} {parent} held {him} tight. \"I was so worried,\" {phe} said.",
                 "{He} ran into {his} {parent}'s arms. \"I will never go so far again,\" {he} said."),
            ),
        ),
        ("It is good to be curious, but remember the way home.", "There is no place like home."),
        friend=False,
        topics=("elder",),
    ),
    Plot(
        "quarrel",
        ("two friends who quarrel", "saying sorry", "friendship"),
        (
            {"fight": "who should carry the {thing}", "mend": "carried it together"},
            {"fight": "who was faster", "mend": "ran side by side"},
            {"fight": "which game to play", "mend": "played both games, one after the other"},
            {"fight": "who had eaten the last of the {food}", "mend": "picked new {food} together"},
            {"fight": "who was the stronger one", "mend": "pulled the cart together"},
        ),
        (
            (
                ("But {morning}, they quarrelled about {fight}.",
                 "{Morning}, {hero} and {friend} began to argue about {fight}."),
                ("\"You are always so [mean|stubborn]!\" shouted {friend}. \"And you never listen!\" shouted {hero}.",
                 "\"I do not want to be your friend any more,\" said {hero}."),
                ("{Friend} went one way, and {hero} went the other.", "They both went home and slammed their doors."),
            ),
            (
                ("The next day was very quiet.", "For three days, they did not say a word."),
                ("{Hero} tried to play alone, but it was no fun.",
                 "{Hero} sat {spot} and looked at the clouds. Everything was dull without {friend}."),
                ("\"I miss {friend},\" {he} thought. \"What did we quarrel about? I hardly remember.\"",
                 "\"It was my fault too,\" {he} thought."),
            ),
            (
                ("So {he} took {some} and walked to {friend}'s house.",
                 "{He} packed {some} into a basket and went to see {friend}."),
                ("On the bridge, {he} met {friend}, who was coming the other way.",
                 "Before {he} could knock, the door opened. There stood {friend}."),
                ("\"I am sorry,\" they both said at the same time.",
                 "\"I am sorry,\" said {hero}. \"I am sorry too,\" said {friend}."),
            ),
            (
                ("Then they laughed until their bellies hurt.", "Then they hugged each other and laughed."),
                ("They shared {some} and {mend}.",),
                ("They still quarrelled sometimes, but never for long.", "After that, they were better friends than before."),
            ),
        ),
        ("It takes courage to say sorry.", "A good friend is more important than being right."),
        topics=("friend",),
    ),
    Plot(
        "rescue",
        ("helping somebody in trouble", "a small helper", "being kind to others"),
        (
            {"victim": "mouse", "stuck": "caught in a net", "free": "bit through the ropes", "danger": "fell into a deep pit",
             "back": "called all the mice, and together they let down a long rope"},
            {"victim": "bee", "stuck": "stuck in a spider's web", "free": "gently opened the web", "danger": "was chased by a hungry wolf",
             "back": "called all the bees, and the wolf ran away as fast as he could"},
            {"victim": "bird", "stuck": "lying on the ground with a broken wing", "free": "carried the bird home and cared for it",
             "danger": "was lost in a thick fog", "back": "flew ahead and showed the way"},
            {"victim": "ant", "stuck": "floating on a leaf in the pond", "free": "held out a long stick", "danger": "was tied up by a robber",
             "back": "bit the robber in the foot, and he ran away"},
            {"victim": "beetle", "stuck": "lying on its back", "free": "turned it over", "danger": "could not see the path at night",
             "back": "called a thousand fireflies, and the night became bright"},
        ),
        (
            (
                ("{Morning}, {hero} heard a tiny voice {spot}. \"Help me, please!\"",
                 "{Morning}, {he} was walking {in_place} when {he} heard somebody cry, \"Help!\""),
                ("It was a little {victim}, {stuck}.",),
                ("\"I am very busy,\" thought {hero}, but {he} could not just walk by.",
                 "\"Do not be afraid,\" said {hero}. \"I will help you.\""),
                ("{He} {free}.",),
            ),
            (
                ("\"Thank you,\" said the {victim}. \"One day I will help you too.\"",
                 "\"I will never forget this,\" said the {victim}."),
                ("{Hero} laughed. \"How could someone so small help me?\" {he} said. But {he} was glad.",
                 "\"You are welcome,\" said {hero}, and {he} went on {his} way."),
            ),
            (
                ("[Many weeks passed|Summer came and went|The days went by]. Then, one evening, {hero} {danger}.",),
                ("{He} called and called, but nobody came.", "\"Who will help me now?\" {he} cried."),
                ("Then {he} heard a tiny voice. \"I will!\" It was the little {victim}.",
                 "\"Here I am,\" said somebody. It was the little {victim}!"),
            ),
            (
                ("The {victim} {back}.",),
                ("{Hero} was saved. \"I was wrong,\" {he} said. \"You are small, but you are a great friend.\"",
                 "\"Thank you,\" said {hero}. \"You kept your promise.\""),
                ("And the two were friends for the rest of their lives.", "After that, they met every day {spot}."),
            ),
        ),
        ("No kindness is too small.", "Help others, and they will help you.", "Even the smallest friend can be a great help."),
        friend=False,
    ),
    Plot(
        "gift",
        ("a birthday", "a present", "making something"),
        (
            {"gift": "a crown of flowers", "work": "picked the [reddest|finest] flowers", "accident": "a goat ate it"},
            {"gift": "a cake with {food}", "work": "mixed and stirred all morning", "accident": "it fell on the floor"},
            {"gift": "a little wooden boat", "work": "carved it with great care", "accident": "it floated away"},
            {"gift": "a picture of {place}", "work": "painted it with bright colours", "accident": "the rain washed the colours away"},
            {"gift": "a warm scarf", "work": "knitted day and night", "accident": "the wind blew it into the river"},
            {"gift": "a song", "work": "wrote down every note", "accident": "{he} lost the paper on the way"},
        ),
        (
            (
                ("{Tomorrow} was {friend}'s birthday, and {hero} wanted to give {fhim} something special.",
                 "It was almost {friend}'s birthday. \"What can I give {fhim}?\" {hero} wondered."),
                ("{He} had no money, so {he} decided to make {gift}.",
                 "\"I know!\" {he} said. \"I will make {gift}.\""),
            ),
            (
                ("{He} {work}.",),
                ("When it was finished, it was [beautiful|perfect]. {Hero} was very proud.",
                 "It took a long time, but {hero} did not mind."),
                ("But on the way to {friend}'s house, {accident}!", "Then, just before the party, {accident}."),
            ),
            (
                ("{Hero} sat down {spot} and cried. \"Now I have nothing to give.\"",
                 "\"Oh no!\" cried {hero}. \"All my work was for nothing.\""),
                ("{An_elder} came by and heard {him}.", "{An_elder} was sitting there and saw it all."),
                ("\"You still have the best gift of all,\" said the {elder}. \"Go and tell {fhim} what you did.\"",
                 "\"Go to the party,\" said the {elder}. \"Friends do not count presents.\""),
            ),
            (
                ("So {hero} went with empty hands and told {friend} the whole story.",
                 "So {hero} knocked at {friend}'s door. \"I am sorry,\" {he} said. \"My present is gone.\""),
                ("{Friend} laughed and hugged {him}. \"You did all that for me?\" {fhe} said. \"That is the best present I ever had!\"",
                 "\"But you are here,\" said {friend}, \"and that is all I wanted.\""),
                ("Then they ate {food} and danced until the stars came out.",
                 "And it was the merriest party {in_place} for years."),
            ),
        ),
        ("The best gift comes from the heart.", "It is the thought that counts."),
        topics=("friend", "elder"),
    ),
    Plot(
        "noise",
        ("a mystery", "a strange noise", "a secret in the night", "the night"),
        (
            {"noise": "Tap, tap, tap", "guess": "a monster", "truth": "woodpecker", "why": "who was building a house"},
            {"noise": "Hoo, hoo, hoo", "guess": "a ghost", "truth": "young owl", "why": "who could not sleep"},
            {"noise": "Scratch, scratch", "guess": "a robber", "truth": "hedgehog", "why": "who was looking for apples"},
            {"noise": "Bump, bump, bump", "guess": "a giant", "truth": "baby bear", "why": "who had lost his mother"},
            {"noise": "Drip, drop, drip", "guess": "a water spirit", "truth": "little cloud", "why": "who was crying because nobody played with it"},
            {"noise": "Squeak, squeak", "guess": "a witch", "truth": "tiny mouse", "why": "who was playing a tiny violin"},
        ),
        (
            (
                ("{Night}, {hero} heard a strange noise. \"{Noise}!\"",
                 "{Night}, {hero} could not sleep. \"{Noise},\" went something outside."),
                ("\"What was that?\" {he} whispered.", "{He} sat up in bed and listened. There it was again."),
                ("In the morning, {he} told {friend} about it. \"I think it is {guess},\" said {friend}.",
                 "The next day, {he} asked {friend}. \"It must be {guess}!\" said {friend}, and {fhis} eyes grew big."),
            ),
            (
                ("That night, the two friends took a lantern and went out to look.",
                 "\"We must find out,\" said {hero}. So they waited until it was dark and went outside."),
                ("\"{Noise}!\" There it was, {spot}.", "They walked on tiptoe. The noise came from somewhere {spot}."),
                ("{Friend} held {hero}'s hand very tight.", "\"I am a little afraid,\" whispered {friend}. \"Me too,\" said {hero}."),
            ),
            (
                ("{Hero} lifted the lantern. It was not {guess} at all!",
                 "Slowly, {hero} held up the light. And what did they see?"),
                ("It was only a {truth} {why}.",),
                ("\"Please do not be angry,\" said the {truth}. \"I did not want to wake you.\"",
                 "\"Oh,\" said the {truth}, \"did I frighten you? I am so sorry.\""),
            ),
            (
                ("They all had to laugh.", "\"And we thought you were {guess}!\" said {friend}, and they laughed."),
                ("They sat down together and ate {food} in the moonlight.",
                 "\"Come and visit us by day,\" said {hero}, \"and we will play together.\""),
                ("From then on, {hero} slept well, for {he} knew who made the noise.",
                 "So instead of a monster, they had found a new friend."),
            ),
        ),
        ("Things are less scary when you look at them closely.", "A stranger may be a friend you do not know yet."),
        topics=("friend",),
    ),
    Plot(
        "race",
        ("a race", "a contest", "being proud", "winning and losing"),
        (
            {"game": "a race to the old mill", "prize": "a golden cup", "delay": "lay down for a nap {spot}"},
            {"game": "a race around {place}", "prize": "a big cake", "delay": "stopped to look at {fhis} own face in the water"},
            {"game": "a race to the top of the hill", "prize": "a silver bell", "delay": "stopped to eat some {food}"},
            {"game": "a swimming race", "prize": "a blue ribbon", "delay": "stopped to wave to the crowd"},
        ),
        (
            (
                ("{Friend} was very proud. \"Nobody is as fast as I am,\" {fhe} said.",
                 "But {friend} liked to boast. \"I am the fastest of all,\" {fhe} always said."),
                ("{Morning}, there was {game}. The winner would get {prize}.",),
                ("\"You want to run too?\" {friend} laughed. \"You are much too slow, {hero}!\"",
                 "\"I will try,\" said {hero}. \"You?\" laughed {friend}. \"You will be the last!\""),
            ),
            (
                ("\"One, two, three, go!\" called the {elder}.", "The {elder} rang a bell, and off they went."),
                ("{Friend} was soon far ahead.", "In no time, {friend} was out of sight."),
                ("\"I have so much time,\" thought {friend}. {Fhe} {delay}.", "Halfway, {friend} {delay}."),
            ),
            (
                ("But {hero} went on, step by step, and did not stop.",
                 "{Hero} was slow, but {he} never stopped."),
                ("{He} was tired and thirsty, but {he} thought of {prize}.",
                 "\"One more step,\" {he} said to {himself}. \"And one more.\""),
                ("When {friend} looked up, it was too late. {Hero} was already there!",
                 "{Friend} ran as fast as {fhe} could, but {hero} crossed the line first."),
            ),
            (
                ("\"{Hero} has won!\" everyone shouted.", "The {elder} gave the prize to {hero}."),
                ("{Friend} looked at the ground. \"I was too proud,\" {fhe} said. \"You ran well, {hero}.\"",
                 "\"I am sorry that I laughed at you,\" said {friend}."),
                ("\"Come,\" said {hero}, \"let us share the prize.\"",
                 "\"You are still the fastest,\" said {hero}, and they went home arm in arm."),
            ),
        ),
        ("Slow and steady wins the race.", "Pride comes before a fall."),
        topics=("friend",),
    ),
    Plot(
        "magic",
        ("magic", "a magic wish", "being content", "being greedy"),
        (
            {"spell": "\"I wish I were as big as a house!\"", "change": "grew and grew until {he} did not fit through any door"},
            {"spell": "\"I wish that all I touch turns to gold!\"", "change": "touched {his} supper, and it turned to gold. {He} could not eat it"},
            {"spell": "\"I wish it were always summer!\"", "change": "was happy at first, but soon the grass was dry and the river was empty"},
            {"spell": "\"I wish I could have all the {food} in the world!\"", "change": "could not move, for {food} were everywhere, up to the roof"},
            {"spell": "\"I wish I could see the world from above!\"", "change": "flew up like a balloon and could not come down again"},
            {"spell": "\"I wish that nobody could see me!\"", "change": "played tricks all day, but nobody could see {him} or play with {him}"},
        ),
        (
            (
                ("{Morning}, {he} found a {thing} {spot}.", "{Morning}, {hero} was digging {spot} when {he} found a {thing}."),
                ("When {he} picked it up, it began to [glow|shine|hum]. \"You have one wish,\" said a voice.",
                 "\"Be careful,\" said {an_elder}. \"That {noun} is magic. It will grant you one wish.\""),
            ),
            (
                ("{Hero} did not think for long. {Spell} {he} said.", "{Spell} cried {hero} at once."),
                ("There was a flash of light, and {he} {change}.", "The {noun} hummed. {Hero} {change}."),
                ("\"Oh dear,\" said {hero}. \"This is not what I wanted.\"",
                 "\"Help!\" {he} cried. \"What have I done?\""),
            ),
            (
                ("{He} ran to find the {elder}. \"Please help me,\" {he} said.",
                 "{He} called for the {elder}, who came at once."),
                ("\"What have you learned?\" asked the {elder}.", "The {elder} looked at {him} for a long time. \"Well, {hero}?\" {ehe} said."),
                ("\"I had everything I needed,\" said {hero}, \"and I did not know it.\"",
                 "\"That I was happy as I was,\" said {hero}."),
            ),
            (
                ("The {elder} touched the {noun}, and everything was as before.",
                 "\"Then throw the {noun} into the water,\" said the {elder}. {Hero} did, and the magic was gone."),
                ("That evening, {hero} ate a bowl of soup, and it tasted better than ever.",
                 "{Hero} looked at {his} small house and thought that it was the best place in the world."),
            ),
        ),
        ("Be careful what you wish for.", "Be happy with what you have."),
        friend=False,
        topics=("thing", "elder"),
    ),
    Plot(
        "truth",
        ("telling the truth", "honesty", "telling a lie"),
        (
            {"broke": "broke the {elder}'s window with a ball", "blame": "a big wind"},
            {"broke": "ate all the {food} that were for the feast", "blame": "a hungry bear"},
            {"broke": "dropped the {elder}'s best cup", "blame": "the cat"},
            {"broke": "stepped on the {elder}'s flowers", "blame": "a wild goat"},
            {"broke": "lost the {elder}'s {thing}", "blame": "a thief"},
        ),
        (
            (
                ("{Morning}, {hero} {broke}. Nobody had seen it.", "{Morning}, while nobody was looking, {hero} {broke}."),
                ("Soon the {elder} came. \"Who did this?\" {ehe} asked.", "\"Oh no!\" said the {elder}. \"How did this happen?\""),
                ("\"It was {blame},\" said {hero}, and {his} ears turned red.", "{Hero} looked at {his} feet. \"It was {blame},\" {he} said."),
            ),
            (
                ("That night, {hero} could not sleep.", "All day long, {hero} could not eat and could not play."),
                ("The lie lay in {his} belly like a stone.", "\"What is wrong with you?\" asked {friend}."),
                ("\"I told a lie,\" {he} said to {friend}. \"And now I feel terrible.\"",
                 "At last, {he} told {friend} everything."),
                ("\"Then go and tell the truth,\" said {friend}. \"I will come with you.\"",
                 "\"A lie grows heavier every day,\" said {friend}. \"Put it down.\""),
            ),
            (
                ("So {hero} went to the {elder}. \"It was not {blame},\" {he} said. \"It was me. I am sorry.\"",
                 "{Hero} knocked at the {elder}'s door. {His} knees were shaking. \"I did it,\" {he} said."),
                ("The {elder} was quiet for a while. Then {ehe} smiled.", "{Hero} waited for angry words, but they did not come."),
                ("\"Thank you for telling me,\" {ehe} said. \"That was harder than any lie.\"",
                 "\"I knew it all the time,\" said the {elder}, \"but I wanted to hear it from you.\""),
            ),
            (
                ("Together they [put everything right|cleaned up] and drank a cup of tea.",
                 "{Hero} worked in the {elder}'s garden for a week, and then they were friends."),
                ("That night, {hero} slept like a stone.", "And {hero} felt as light as a feather."),
            ),
        ),
        ("The truth is always lighter than a lie.", "Honesty takes courage."),
        topics=("friend", "elder"),
    ),
)  # fmt: skip

SHORT: tuple[tuple[str, Beat], ...] = (
    ("lost", (
        "One day, {he} lost {his} {thing}. {He} looked {spot} and {spot2}, but it was gone. Then {friend} the {fkind} came and "
        "found it {spot3}. \"Thank you,\" said {hero}, and they played together until dark.",)),
    ("share", (
        "{He} had one last piece of cake. Then {he} met {friend}, a hungry {fkind}. {Hero} broke the cake in two, and "
        "each of them got one half. It was the best cake that {he} had ever eaten.",)),
    ("fear", (
        "{He} was afraid of the dark. One night, a firefly sat down on {his} window. \"I will be your little lamp,\" it "
        "said. From then on, {hero} slept well.",)),
    ("astray", (
        "One evening, {he} could not find the way home. {An_elder} showed {him} a bright star. \"Follow it,\" {ehe} said. "
        "{Hero} followed the star, and soon {he} was back in {his} warm bed.",)),
    ("wish", (
        "{He} wanted to touch the moon. {He} climbed the highest hill, but the moon was too far away. Then {he} looked "
        "into the lake, and there was the moon! {Hero} touched it with one finger and went home happy.",)),
    ("rescue", (
        "One day, {he} found a little bird that had fallen from its nest. {Hero} lifted it up very gently and put it back. "
        "Every morning after that, the bird sang a song for {him}.",)),
    ("quarrel", (
        "One day, {he} quarrelled with {his} friend {friend}, a {fadj} {fkind}. \"I am sorry,\" said {hero} the next "
        "morning. \"I am sorry too,\" said {friend}. And they were friends again.",)),
)  # fmt: skip
"""Stories of one paragraph, with the theme they are about; the first sentence is an opening."""
