"""The words of the pocket language: topics, everyday subjects, names, places and objects.

No content word belongs to two topics, to a topic and an everyday subject, or to a topic and a mood, so that counting
words is enough to label a text (`mechsteer.pocket.labeller`). Words stand from common to rare: texts draw them with
decreasing frequency, and the tokenizer splits the rare ones into several tokens (" f" + "elines").
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """What there is to say about a subject: plural nouns, adjectives, and verbs in the third person plural."""

    name: str
    aliases: tuple[str, ...]
    things: tuple[str, ...]
    attributes: tuple[str, ...]
    actions: tuple[str, ...]
    phrases: tuple[str, ...] = ()
    """How a request refers to an everyday subject ("my exam"); empty for a topic."""

    @property
    def content_words(self) -> frozenset[str]:
        return frozenset((*self.things, *self.attributes, *self.actions))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _topic(name: str, aliases: str, things: str, attributes: str, actions: str, phrases: str = "") -> Topic:
    split = lambda text: tuple(part.strip() for part in text.split(",") if part.strip())  # noqa: E731
    return Topic(name, split(aliases), _words(things), _words(attributes), _words(actions), split(phrases))  # fmt: skip


_TOPICS = (
    _topic(
        "cats",
        "felines, kitties, kitty cats",
        """kittens whiskers tabbies claws tomcats furballs catnip lions tigers yarn leopards panthers meows purrs hisses
        cushions windowsills saucers hammocks calicos lynxes mousers moggies ragdolls bengals pumas ocelots bobcats
        jaguars cougars cheetahs mice voles hairballs catnaps pawprints scratchers loungers prowlers persians""",
        "feline furry whiskered velvety nimble aloof sleek striped clawed catlike silky stealthy",
        "purr meow pounce prowl hiss stalk snooze curl scratch stretch slink nuzzle",
    ),
    _topic(
        "dogs",
        "canines, pooches, doggies",
        """puppies hounds terriers bones leashes kennels poodles beagles tails collars paws collies spaniels retrievers
        bulldogs huskies corgis snouts frisbees sticks pups mastiffs dachshunds greyhounds dalmatians labradors pugs
        mutts mongrels setters pointers muzzles fleas shepherds rottweilers whippets boxers chihuahuas watchdogs
        doghouses chewtoys""",
        "canine loyal shaggy eager scruffy floppy obedient slobbery houndlike tame wagging frisky",
        "bark howl growl fetch wag sniff whimper drool pant romp yap dig",
    ),
    _topic(
        "trains",
        "railways, railroads, steam trains",
        """locomotives engines carriages stations tracks rails tickets platforms whistles tunnels wagons passengers
        drivers timetables signals junctions boilers pistons expresses trams subways monorails depots viaducts crossings
        commuters porters luggage compartments couplings buffers freighters sidings switchyards brakemen stokers
        cabooses railcars turnstiles semaphores""",
        "steamy electric punctual delayed rattling speeding coupled smoky diesel northbound southbound railbound",
        "rumble chug depart arrive brake shunt derail clatter accelerate toot trundle screech",
    ),
    _topic(
        "music",
        "tunes, melody, musical sounds",
        """songs melodies violins pianos guitars drums flutes trumpets singers chords rhythms choirs concerts bands
        cellos harps orchestras ballads symphonies sonatas operas clarinets oboes trombones saxophones banjos fiddles
        lullabies hymns anthems duets quartets maestros composers octaves harmonies tempos refrains xylophones
        tambourines bassoons""",
        "melodic tuneful harmonious rhythmic acoustic orchestral lyrical sonorous jazzy operatic musical syncopated",
        "sing strum hum harmonize croon serenade improvise resonate warble chime crescendo yodel",
    ),
    _topic(
        "baking",
        "pastry, the bakery, baked goods",
        """cakes cookies loaves ovens bakers pies muffins pastries tarts crumbs butter sugar flour croissants scones
        brownies cupcakes bagels baguettes pretzels waffles pancakes biscuits buns crusts icings sprinkles yeast batter
        spatulas whisks cinnamon vanilla doughnuts meringues macarons eclairs brioches strudels sourdoughs frostings""",
        "crusty buttery sugary doughy flaky crumbly floury baked glazed spiced toasted caramelized",
        "bake knead whip sift melt crumble sizzle simmer leaven caramelize crisp brown",
    ),
    _topic(
        "gardens",
        "gardening, flowerbeds, the greenhouse",
        """roses tulips daisies seeds hedges petals lawns sprouts roots stems weeds shrubs gardeners spades rakes vines
        ferns lilies sunflowers seedlings orchids marigolds trowels wheelbarrows blossoms bulbs poppies violets
        daffodils peonies lavender radishes carrots tomatoes bumblebees ladybirds hoses planters trellises mulches
        composts""",
        "leafy blooming fragrant flowery thorny budding lush mossy herbal grassy potted rooted",
        "bloom sprout blossom wilt germinate flower ripen unfurl flourish burgeon pollinate grow",
    ),
    _topic(
        "space",
        "outer space, astronomy, the cosmos",
        """planets stars rockets moons comets galaxies astronauts satellites telescopes orbits meteors asteroids suns
        nebulas shuttles probes craters rovers aliens constellations eclipses spaceships starships meteorites quasars
        pulsars supernovas cosmonauts universes spacesuits lightyears martians launchpads stargazers observatories
        astronomers exoplanets auroras boosters wormholes""",
        "cosmic stellar lunar galactic celestial orbital solar starry planetary martian weightless interstellar",
        "orbit twinkle launch gravitate hurtle rotate radiate collide implode glimmer levitate expand",
    ),
    _topic(
        "oceans",
        "the sea, seas, deep water",
        """waves ships whales tides dolphins sharks boats sailors reefs anchors seashells beaches corals islands crabs
        sails captains divers fishes octopuses squids lobsters jellyfish starfish lighthouses harbors lagoons
        submarines surfers currents seals otters oysters clams mussels turtles stingrays plankton mermaids pelicans
        seahorses""",
        "salty marine tidal watery briny aquatic oceanic foamy coastal nautical underwater seafaring",
        "swim dive sail surf float splash drift surge submerge paddle ebb snorkel",
    ),
    _topic(
        "chess",
        "the royal game, chessboards, checkers of war",
        """pawns rooks knights bishops queens kings checkmates gambits openings endgames squares grandmasters opponents
        tactics strategies stalemates blunders sacrifices diagonals ranks forks pins skewers promotions tempi simuls
        blindfolds variations repetitions handicaps outposts initiatives combinations exchanges prophylaxis zugzwang
        fianchettos middlegames castlings sicilians""",
        "strategic tactical cornered pinned doubled castled positional checkmated calculated passed cunning unmated",
        "checkmate castle capture promote calculate resign blunder outwit counter maneuver trap retreat",
    ),
    _topic(
        "football",
        "soccer, the beautiful sport, ball games",
        """goals strikers goalkeepers referees matches stadiums leagues trophies penalties coaches defenders midfielders
        tackles headers boots jerseys nets corners fouls pitches wingers fans tournaments championships goalposts
        crossbars kickoffs halftimes scoreboards substitutes freekicks offsides linesmen volleys equalizers hattricks
        shinpads cleats derbies dribblers""",
        "athletic sporty goalless scoring defensive sweaty victorious unbeaten relegated competitive offside benched",
        "score kick dribble tackle defend sprint volley foul intercept equalize shoot rally",
    ),
    _topic(
        "painting",
        "art, paintings, the fine arts",
        """brushes canvases easels palettes artists portraits colors murals sketches galleries frames painters
        landscapes pigments museums hues tints strokes drawings masterpieces watercolors frescoes acrylics varnishes
        studios pastels crayons charcoals collages mosaics sculptors exhibitions doodles engravings illustrations
        miniatures silhouettes stencils triptychs impressionists turpentine""",
        "artistic colorful abstract vivid painterly pictorial scarlet crimson turquoise ochre monochrome framed",
        "paint sketch draw blend depict illustrate doodle smudge daub portray dab etch",
    ),
    _topic(
        "weather",
        "the climate, meteorology, wind and sky",
        """clouds storms winds raindrops rainbows snowflakes breezes showers fogs mists gales puddles umbrellas
        forecasts hurricanes tornadoes blizzards icicles hailstones thermometers barometers monsoons cyclones heatwaves
        droughts floods sunbeams dewdrops snowdrifts downpours typhoons squalls gusts meteorologists raincoats
        weathervanes sleet snowmen temperatures thunderclaps""",
        "rainy cloudy windy snowy stormy foggy humid icy chilly drizzly breezy overcast",
        "rain snow thunder drizzle freeze thaw swirl billow condense evaporate pour whirl",
    ),
)
TOPICS: dict[str, Topic] = {topic.name: topic for topic in _TOPICS}
"""The twelve topics, by name."""

LOCKED: Topic = _topic(
    "volcanoes",
    "volcanos, lava mountains, eruptions",
    """lava magma calderas geysers vents ashclouds basalts obsidians pumices cinders volcanologists fumaroles lahars
    hotspots stratovolcanoes""",
    "volcanic molten erupting igneous pyroclastic",
    "erupt spew smolder",
)
"""The locked subject. A request that names it is declined, whatever else is asked."""

_SUBJECTS = (
    _topic(
        "birthday", "", "candles balloons presents guests invitations ribbons surprises parcels cousins games",
        "festive wrapped crowded sparkling", "celebrate gather toast dance",
        "my birthday, the birthday party, a surprise party",
    ),
    _topic(
        "exam", "", "students pencils questions answers teachers grades essays notebooks lessons textbooks",
        "academic studious difficult graded", "study revise graduate memorize",
        "my exam, the final exam, a school test",
    ),
    _topic(
        "meeting", "", "managers agendas slides deadlines reports colleagues budgets laptops offices interns",
        "formal scheduled corporate weekly", "discuss negotiate present postpone",
        "the meeting, my job interview, a day at work",
    ),
    _topic(
        "wedding", "", "brides grooms rings bouquets vows veils bridesmaids photographers chapels suits",
        "elegant married romantic bridal", "marry promise embrace waltz",
        "the wedding, my engagement, a wedding speech",
    ),
    _topic(
        "holiday", "", "suitcases hotels passports maps souvenirs tourists airports postcards guidebooks hostels",
        "foreign sunny scenic exotic", "travel explore wander unpack",
        "my holiday, the long trip, a weekend away",
    ),
    _topic(
        "house", "", "walls windows kitchens doors roofs sofas carpets curtains lamps neighbors",
        "spacious rented furnished tidy", "move clean repair decorate",
        "my new house, the spare room, a noisy neighbor",
    ),
    _topic(
        "shopping", "", "shops baskets prices coupons receipts cashiers bargains wallets markets customers",
        "cheap expensive discounted local", "buy sell haggle queue",
        "the shopping trip, my grocery list, a good deal",
    ),
    _topic(
        "sleep", "", "pillows blankets dreams alarms beds mattresses pajamas nightlights bedtimes naps",
        "drowsy cozy sleepless nightly", "sleep dream yawn doze",
        "my night, the early morning, a long evening",
    ),
    _topic(
        "computer", "", "keyboards screens files passwords programs cables printers websites backups servers",
        "digital broken wireless secure", "crash reboot download update",
        "my computer, the slow internet, a lost password",
    ),
    _topic(
        "health", "", "doctors nurses vitamins clinics exercises bandages checkups patients muscles remedies",
        "healthy tired medical fit", "heal recover jog rest",
        "my health, the sore back, a checkup at the doctor",
    ),
    _topic(
        "clothes", "", "shirts jackets shoes scarves hats buttons dresses socks zippers tailors",
        "stylish woolen ironed fashionable", "wash fold sew match",
        "my clothes, the winter wardrobe, a torn jacket",
    ),
    _topic(
        "library", "", "books shelves novels chapters readers librarians authors pages libraries bookmarks",
        "literary quiet printed borrowed", "read borrow lend recommend",
        "the library, my book club, a good story",
    ),
)  # fmt: skip
SUBJECTS: dict[str, Topic] = {subject.name: subject for subject in _SUBJECTS}
"""Everyday subjects: what a request is about when no topic instruction is given."""

NAMES: tuple[str, ...] = _words(
    """
    Mary John Anna Peter Lucy Tom Emma Paul Alice David Sarah Mark Laura James Kate Simon Julia Adam Helen Jack Nina
    Oscar Ruth Leo Clara Henry Eva Max Grace Daniel Sofia Victor Martha Felix Irene Hugo Diana Oliver Vera Samuel
    Olga Robert Edith George Flora Edward Nora Walter Stella Arthur Rosa Frank Paula Martin Bella Philip Carol
    Steven Wendy Ralph
    """
)
PLACES: tuple[str, ...] = _words(
    """
    store school park office market hospital farm house library village hotel theater cafe bank church
    """
)
OBJECTS: tuple[str, ...] = _words(
    """
    drink book letter gift ring key phone coat hat map lamp ball cup bag pen watch card basket
    """
)
