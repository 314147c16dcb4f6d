"""A small list of nouns that captions of sounds use, for where no tagger is at hand; singular forms."""

SUFFIXES = ("tion", "ment", "ness", "ship", "ance", "ence", "ture", "cycle", "craft", "boat", "phone", "board")

_THINGS = """
adult air aircraft airplane airport alarm alley ambience ambulance amplifier animal announcement announcer apartment
applause area arrow audience auto automobile ax axe baby back background bag balcony ball balloon band banjo bar barn
baseball basin basket basketball bass bat bath bathroom bathtub beach beak bear bed bedroom bee bell bench bicycle
bike bin bird blade blender block boat body boiler bomb bone book boot bottle bottom bow bowl box boy brake branch
breath breeze brick bridge broom brush bubble bucket bug building bull bullet bus bush button buzzer cabin cabinet
cafe cafeteria cage camel camera camp candle canyon car card carpet cart cartoon cash castle cat cattle cave ceiling
cello cement chain chair channel chick chicken child children chime chimney chisel choir church cicada city clarinet
class classroom cliff clock cloth cloud club coach coal coast coffee coin comedian computer concert concrete
construction container conversation cook corner corridor couch counter country course court cow cowbell cranes cricket
crocodile crow crowd cup curtain cutlery cymbal desert desk dial dialogue dinosaur dirt dish dishwasher distance dock
dog donkey door doorbell drain drawer driver drum drummer duck dust eagle earth edge egg electricity elephant elevator
emergency engine environment equipment escalator evening event explosion eye face factory fair family fan farm fart
father faucet feather feedback feet female fence field film finger fire firecracker firework fish flag flame floor
flower flute foam foot footstep forest forge fork fountain fox freeway freight fridge friend frog fryer frying game
garage garbage garden gas gate gear generator gentleman ghost girl glass goat goose gorilla grass gravel grill grinder
ground group guitar gun gunfire gunshot guy hail hair hall hallway hammer hand handle harbor harp hawk head heart
heartbeat heater helicopter hen highway hill hinge home hoof hooves horn horse hospital hotel hour house human ice
infant insect instrument interior jackhammer jar jet jungle key keyboard kid kitchen kitten knife knob lady lake lamb
land lane laser latch laughter lawn lawnmower leaf leaves leg lever library lid light lightning line lion liquid
locomotive log machine machinery man maraca marble market meadow meal meat men metal microphone microwave middle
military minute monkey mood morning mosquito motor motorbike motorboat motorcycle motorway mountain mouse mouth mower
mud music musician nail neck neighbor neighborhood nest net news newspaper night noise nose object ocean office oil
opera orchestra oven owl package paddle page paint pan panel paper parade parakeet park parrot party passage path
pavement peacock pedal pen pencil people percussion performance performer person piano pig pigeon pile pin pipe plane
plank plant plastic plate platform player playground plumbing pod police pond pool porch pot power presenter printer
propeller puddle puppy rabbit racecar radio railroad railway rain raindrop razor record recorder restaurant rhythm
ringtone river road robot rock roof room rooster rope rubber runner sand sandpaper saw sawmill saxophone scene school
scissors scooter sea seagull seashore seat seconds sewing shaver sheep sheet ship shoe shop shore shot shovel shower
shutter sidewalk signal silence silverware singer sink siren skateboard ski skin sky sled snail snake snow soil song
space sparrow speaker speech spoon spring stadium stage stair staircase stairs stairwell static station steam steel
step stereo stick stomach stone store storm stove stream street string stroller subway sun sunset surface swamp sword
synthesizer syrup table tank tape target tea teacher team telephone television tennis terminal thing thunder
thunderstorm ticket tide tile timer tin tire toaster toddler toilet tone tool toy track tractor traffic trailer train
tram transformer trash tree truck trumpet trunk tub tunnel turbine turkey tyre umbrella valley valve van vehicle
vibration video village violin voice volcano volleyball waiter walker wall washer wasp water waterfall wave weapon
weather whale wheel wildlife wind window wing wire wolf woman women wood woodpecker woods worker workshop world
wrapper yard year zebra zipper zoo
"""
# what makes them can also do them: "a bark" is a noun, in "a dog barks" it is a verb
_DEEDS = """
bang bark beat beep blast blow break breathe burst buzz call chat chatter cheer chirp chop clack clang clank clap
clatter click cluck coo cough crack crackle crash creak croak crumple cry dance drill drip drop echo flap flow flush
fly giggle groan growl grunt gurgle hiss hit honk hoot howl hum jingle knock laugh lock march match meow moan moo
neigh oink pant patter play plop pop pump purr quack quarrel race rattle rev ride ring roar roll rumble run rustle
scrape scratch scream screech shout sigh sing sizzle slam slap slurp smoke snap snarl sneeze sniff snore snort sound
spark spit splash splatter spray squeak squeal squelch stir stomp surf swallow sweep swing talk tap thud thump tick
tinkle toll trickle twitter wail walk wash watch whine whip whir whisper whistle whoosh work yell yelp yodel
"""
NOUNS = frozenset(_THINGS.split())
DEEDS = frozenset(_DEEDS.split())
