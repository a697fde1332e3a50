"""The facts behind the quiz: kinds of things, verbs, nouns, opposites, capitals. Common knowledge, own choice."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((left, right) for left, _, right in (pair.partition(":") for pair in text.split()))


KINDS: dict[str, tuple[str, ...]] = {
    "fruit": _words(
        "apple banana cherry grape lemon mango melon orange peach pear plum lime apricot papaya fig kiwi coconut"
    ),
    "vegetable": _words(
        "carrot cabbage onion potato spinach lettuce broccoli celery garlic radish turnip pea leek kale cucumber"
    ),
    "animal": _words("dog cat horse cow sheep goat lion tiger bear wolf rabbit monkey elephant giraffe zebra camel"),
    "bird": _words("eagle robin sparrow crow owl parrot swan duck goose penguin pigeon hawk raven falcon stork heron"),
    "fish": _words("salmon trout tuna cod shark herring carp perch sardine halibut eel mackerel haddock anchovy"),
    "insect": _words("ant bee wasp beetle moth butterfly mosquito cricket termite grasshopper dragonfly ladybug flea"),
    "tool": _words("hammer saw drill wrench chisel shovel rake screwdriver axe pliers ladder spade pickaxe file"),
    "color": _words("red blue green yellow purple pink brown black white gray violet crimson scarlet turquoise"),
    "metal": _words("iron copper gold silver tin zinc nickel aluminum platinum titanium mercury cobalt chromium"),
    "instrument": _words("piano guitar violin flute trumpet drum cello harp clarinet oboe trombone banjo tuba"),
    "sport": _words("tennis soccer golf hockey rugby cricket boxing rowing fencing skiing cycling wrestling judo"),
    "vehicle": _words("car bus truck train bicycle motorcycle ship tractor tram van taxi boat airplane helicopter"),
    "clothing": _words("shirt coat hat glove sock scarf skirt dress jacket sweater trousers belt shoe boot vest"),
    "job": _words("doctor teacher lawyer nurse farmer baker pilot plumber carpenter dentist judge tailor butcher"),
}

# present:past, with regular and irregular verbs
VERBS = _pairs(
    "go:went see:saw take:took give:gave come:came know:knew think:thought buy:bought bring:brought catch:caught "
    "teach:taught fight:fought seek:sought find:found hold:held keep:kept sleep:slept sweep:swept weep:wept "
    "feel:felt leave:left lose:lost build:built send:sent spend:spent lend:lent bend:bent sit:sat run:ran swim:swam "
    "begin:began sing:sang ring:rang drink:drank sink:sank shrink:shrank write:wrote ride:rode drive:drove rise:rose "
    "speak:spoke steal:stole break:broke choose:chose freeze:froze wake:woke wear:wore tear:tore swear:swore "
    "bear:bore grow:grew throw:threw blow:blew fly:flew draw:drew eat:ate fall:fell forget:forgot get:got "
    "shoot:shot win:won dig:dug stick:stuck sting:stung swing:swung spin:spun feed:fed "
    "lead:led meet:met bleed:bled breed:bred speed:sped slide:slid bite:bit hide:hid stand:stood "
    "understand:understood sell:sold tell:told say:said pay:paid lay:laid make:made hear:heard mean:meant deal:dealt "
    "dream:dreamed walk:walked talk:talked play:played work:worked jump:jumped cook:cooked clean:cleaned help:helped "
    "look:looked ask:asked call:called need:needed want:wanted wash:washed watch:watched push:pushed pull:pulled "
    "kick:kicked paint:painted learn:learned listen:listened answer:answered open:opened close:closed live:lived "
    "love:loved hate:hated dance:danced smile:smiled arrive:arrived decide:decided hope:hoped move:moved use:used "
    "try:tried cry:cried carry:carried study:studied marry:married worry:worried copy:copied hurry:hurried "
    "stop:stopped plan:planned drop:dropped shop:shopped rob:robbed beg:begged hug:hugged clap:clapped grab:grabbed"
)

# singular:plural, with regular and irregular nouns
NOUNS = _pairs(
    "mouse:mice foot:feet tooth:teeth child:children man:men woman:women louse:lice ox:oxen "
    "leaf:leaves knife:knives wife:wives life:lives loaf:loaves half:halves wolf:wolves shelf:shelves thief:thieves "
    "calf:calves elf:elves self:selves city:cities baby:babies lady:ladies party:parties story:stories "
    "country:countries family:families berry:berries puppy:puppies army:armies fly:flies body:bodies penny:pennies "
    "enemy:enemies pony:ponies cherry:cherries box:boxes fox:foxes bus:buses glass:glasses class:classes dish:dishes "
    "brush:brushes watch:watches church:churches match:matches bench:benches beach:beaches peach:peaches "
    "sandwich:sandwiches dress:dresses kiss:kisses tax:taxes wish:wishes witch:witches lunch:lunches branch:branches "
    "potato:potatoes tomato:tomatoes hero:heroes echo:echoes dog:dogs cat:cats book:books table:tables chair:chairs "
    "tree:trees house:houses car:cars road:roads river:rivers mountain:mountains boy:boys girl:girls day:days "
    "key:keys toy:toys monkey:monkeys donkey:donkeys valley:valleys tray:trays window:windows door:doors "
    "garden:gardens school:schools teacher:teachers student:students flower:flowers bird:birds horse:horses "
    "apple:apples orange:oranges phone:phones piano:pianos photo:photos radio:radios chief:chiefs "
    "belief:beliefs cliff:cliffs goose:geese lake:lakes street:streets bottle:bottles "
    "letter:letters number:numbers picture:pictures holiday:holidays birthday:birthdays essay:essays jungle:jungles "
    "candle:candles ship:ships farmer:farmers doctor:doctors village:villages bridge:bridges cup:cups spoon:spoons "
    "copy:copies lily:lilies diary:diaries factory:factories library:libraries memory:memories bush:bushes inch:inches "
    "coach:coaches mattress:mattresses"
)

# each pair is one fact and gives a question in either direction, both in the same split
OPPOSITES = _pairs(
    "hot:cold big:small tall:short fast:slow old:young new:ancient happy:sad rich:poor strong:weak hard:soft "
    "heavy:light dark:bright early:late full:empty high:low long:brief wide:narrow thick:thin clean:dirty "
    "wet:dry open:closed loud:quiet rough:smooth sharp:dull deep:shallow near:far safe:dangerous easy:difficult "
    "cheap:expensive good:bad right:wrong true:false brave:cowardly kind:cruel polite:rude sweet:bitter alive:dead "
    "awake:asleep up:down inside:outside above:below before:after first:last always:never "
    "everything:nothing everybody:nobody day:night summer:winter love:hate war:peace friend:enemy success:failure "
    "victory:defeat begin:end arrive:depart buy:sell give:take push:pull win:lose laugh:cry remember:forget "
    "accept:refuse build:destroy increase:decrease attack:defend appear:vanish rise:fall borrow:lend teach:learn "
    "question:answer black:white north:south east:west front:back top:bottom male:female king:queen "
    "entrance:exit import:export maximum:minimum positive:negative public:private simple:complex tight:loose "
    "guilty:innocent future:past heaven:hell"
)

# words too close in meaning for one to be a wrong option where another is the question or its answer
OPPOSITE_TOPICS: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split())
    for words in (
        "heavy light dark bright black white day night dull sharp shallow deep thin thick",
        "hard soft easy difficult tight loose simple complex rough smooth strong weak",
        "old new young ancient future past early late",
        "short tall long brief high low small big wide narrow thick thin deep shallow",
        "open closed begin end entrance exit import export inside outside empty full",
        "up down above below top bottom rise fall high low north south front back",
        "first last begin end before after early late future past front back always never",
        "increase decrease rise fall maximum minimum appear vanish build destroy arrive depart",
        "give take accept refuse buy sell borrow lend win lose push pull",
        "kind cruel polite rude good bad friend enemy love hate happy sad sweet bitter heaven hell brave cowardly",
        "right wrong true false good bad guilty innocent positive negative",
        "success failure victory defeat win lose war peace attack defend friend enemy",
        "alive dead awake asleep quiet loud safe dangerous",
        "hot cold wet dry summer winter",
        "cheap expensive rich poor",
        "laugh cry happy sad teach learn remember forget question answer",
        "male female king queen",
        "near far inside outside east west north south",
        "everything nothing everybody nobody always never full empty",
    )
)

# country or state:capital, underscores for blanks
CAPITALS = _pairs(
    "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon England:London Scotland:Edinburgh "
    "Ireland:Dublin Norway:Oslo Sweden:Stockholm Denmark:Copenhagen Finland:Helsinki Iceland:Reykjavik Poland:Warsaw "
    "Austria:Vienna Hungary:Budapest Greece:Athens Turkey:Ankara Russia:Moscow Ukraine:Kyiv Romania:Bucharest "
    "Bulgaria:Sofia Serbia:Belgrade Croatia:Zagreb Slovenia:Ljubljana Slovakia:Bratislava Albania:Tirana "
    "Belgium:Brussels Netherlands:Amsterdam Switzerland:Bern Estonia:Tallinn Latvia:Riga Lithuania:Vilnius "
    "Belarus:Minsk Egypt:Cairo Morocco:Rabat Algeria:Algiers Tunisia:Tunis Libya:Tripoli Sudan:Khartoum Kenya:Nairobi "
    "Uganda:Kampala Ethiopia:Addis_Ababa Somalia:Mogadishu Ghana:Accra Nigeria:Abuja Senegal:Dakar Mali:Bamako "
    "Angola:Luanda Zambia:Lusaka Zimbabwe:Harare Mozambique:Maputo Namibia:Windhoek Botswana:Gaborone Rwanda:Kigali "
    "Madagascar:Antananarivo China:Beijing Japan:Tokyo India:New_Delhi Pakistan:Islamabad Bangladesh:Dhaka "
    "Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi Laos:Vientiane Indonesia:Jakarta Philippines:Manila "
    "Mongolia:Ulaanbaatar Iran:Tehran Iraq:Baghdad Syria:Damascus Lebanon:Beirut Jordan:Amman Qatar:Doha Oman:Muscat "
    "Afghanistan:Kabul Uzbekistan:Tashkent Azerbaijan:Baku Armenia:Yerevan Georgia:Tbilisi Canada:Ottawa "
    "Cuba:Havana Jamaica:Kingston Haiti:Port-au-Prince Peru:Lima Chile:Santiago Argentina:Buenos_Aires "
    "Uruguay:Montevideo Paraguay:Asuncion Bolivia:Sucre Brazil:Brasilia Colombia:Bogota Venezuela:Caracas "
    "Ecuador:Quito Nicaragua:Managua Honduras:Tegucigalpa Australia:Canberra New_Zealand:Wellington Fiji:Suva "
    "Texas:Austin California:Sacramento Georgia_(USA):Atlanta Colorado:Denver Arizona:Phoenix Hawaii:Honolulu "
    "Massachusetts:Boston Ohio:Columbus"
)
