"""Ordinary English sentences of six to nine words, for scripts/benchmark/kokoro_ear.py.

None has figures, names or words that are spelled in two ways, so that every difference to what is
heard is an error. Nothing was trained on them.
"""

SENTENCES = """\
The train was late again this morning.
Please close the window before you leave.
She keeps her keys in a blue bowl.
We walked along the river until dark.
My sister lives in a quiet little town.
There is no milk left in the fridge.
He forgot to lock the front door.
The children are playing in the yard.
Could you help me carry these boxes?
I have never seen such a large dog.
The bread smells wonderful when it is warm.
They moved here from the coast last summer.
What time does the library open today?
The road is closed because of the snow.
Our teacher told us a funny story.
You should drink more water when it is hot.
The cat slept on the chair all day.
I would like a table near the window.
He painted the kitchen walls a pale yellow.
Nobody answered when I knocked on the door.
The bus stops in front of the bank.
She wrote a long letter to her brother.
Turn the music down, please, I am working.
The soup needs a little more salt.
We lost the game, but we had fun.
Are you coming to the party on Friday?
The leaves turn red and gold in autumn.
His grandfather used to fix old clocks.
I left my umbrella on the train.
The doctor said that I should rest.
Birds were singing outside before the sun came up.
She bought a green coat for the winter.
The phone rang in the middle of dinner.
We need to leave before it gets dark.
That was the best meal of the week.
He runs several times around the park.
The lake is too cold for swimming now.
The old couple grows tomatoes behind the house.
I cannot remember where I parked the car.
The baby finally fell asleep after lunch.
Do you want coffee or tea with that?
The museum is free on the first Sunday.
A thick fog covered the whole valley.
She speaks very quietly on the telephone.
The shop on the corner sells fresh fish.
He broke his arm while climbing a tree.
We watched the ships come into the bay.
The answer was written on the board.
Put the plates back on the top shelf.
I think that you took the wrong bag.
The wind blew his hat into the river.
They planted apple trees along the fence.
Is there a doctor in this village?
The old bridge was built of stone.
She always reads before she goes to sleep.
My shoes are wet from the rain.
He promised to call us after the meeting.
The horse ran across the open field.
There were only a few people at the concert.
You can see the mountains from our roof.
The cake has to cool for an hour.
I met your cousin at the market.
Somebody has eaten the last piece of cheese.
The lights went out during the storm.
We took the wrong turn at the church.
Her voice sounded tired on the phone.
The water in the well is very clear.
He carries a small knife in his pocket.
Why did you not tell me earlier?
The farmer sold his cows in the spring.
It was raining when we reached the hotel.
She cut the bread into thin slices.
The plane will land in a few minutes.
Everyone laughed at the end of the play.
I need a new battery for my watch.
The dog barked at the man with the ladder.
He studied history before he became a lawyer.
Our garden is full of bees this year.
The movie was much longer than I expected.
Please write your name at the top.
They ate their lunch under a big tree.
The nurse gave him a glass of water.
I have to wash the dishes after dinner.
The letter arrived a week too late.
She found a silver coin on the beach.
This soap smells like lemons and mint.
The river froze in the first week of winter.
He asked the driver to stop at the corner.
We can eat outside if it stays dry.
The paper is thin and tears easily.
My father taught me how to swim.
Did you hear the thunder last night?
The tickets are cheaper in the morning.
A small boat drifted slowly down the stream.
She hung the picture above the fireplace.
The teacher collected the papers after class.
I will wait for you at the station.
The new road makes the trip much shorter.
He put too much sugar in his tea.
The moon was bright enough to read by.
They have been friends since they were children.
The kitchen floor is still wet, be careful.
She won a prize for her drawing.
The tower can be seen from far away.
I dropped my glasses and broke them.
How much does this bottle of oil cost?
The band played until late in the evening.
He keeps a city map in his car.
The flowers on the table need some water.
We heard strange noises in the attic.
My brother is learning to play the drums.
The ice was too thin to walk on.
She gave the waiter a friendly smile.
The truck was loaded with sand and bricks.
I would rather stay home and read.
The boy threw a stone into the pond.
You have to sign on the last page.
The hotel is next to a small park.
He woke up before the alarm went off.
The meat should be cooked very slowly.
They opened a bakery on our street.
Her hands were cold from the snow.
The meeting was moved to Thursday afternoon.
I saw a fox behind the barn.
The sea was calm and dark blue.
Can I borrow your pen for a moment?
The roof of the school needs to be repaired.
He has worked at the factory for many years.
The milk was warm and tasted sweet.
We should paint the fence before winter.
She tied the boat to a wooden post.
The cook added pepper and a bit of butter.
My mother keeps old photographs in a box.
The lesson begins right after breakfast.
Nothing is better than a hot bath.
The path leads through the woods to the lake.
I am looking for a gift for my aunt.
The engine stopped in the middle of nowhere.
He speaks many languages, but not this one.
The sun went down behind the hills.
They sat by the fire and told stories.
The price of bread has gone up again.
She hid the present under her bed.
The guests arrived while we were still cooking.
Do not touch the stove, it is hot.
The bird built its nest above our door.
I usually walk to work when it is sunny.
The judge listened without saying a word.
His new bicycle was stolen from the garage.
We saw dolphins from the deck of the ship.
The room was empty except for a chair.
She planned the whole trip by herself.
The clock on the wall is a little fast.
I like the sound of rain on the roof.
The captain ordered his men to turn back.
Where can I buy stamps around here?
The pilot spoke to us after the landing.
He shook the snow from his boots.
The key does not fit into this lock.
They drove all night to reach the border.
The village has a school and a shop.
My uncle catches fish early in the morning.
The report must be finished before lunch.
She wore a red scarf around her neck.
The shelf is too high for me to reach.
I never go to bed before midnight.
The crowd cheered when the runners came in.
Which of these roads goes to the farm?
The boss was pleased with our work.
He filled the bucket with clean water.
The stars look brighter away from the city.
We cleaned the house from top to bottom.
The student asked a very good question.
A cold wind came in through the broken window.
She learned to sew from her grandmother.
The dentist told me to come back in June.
I ordered the chicken with rice and beans.
The wheels of the cart were made of wood.
He could not find a clean shirt to wear.
The fire burned down to white ashes.
They named the puppy after a famous singer.
The bank is closed on public holidays.
It takes an hour to get there by boat.
The wall was covered with green plants.
I forgot what I wanted to say.
The soldiers marched slowly through the mud.
She looked at the price and shook her head.
The tea is in the cupboard above the sink.
We had to push the car up the hill.
The door opened and a stranger walked in.
He reads the newspaper on his way to work.
The beach was empty early in the morning.
My desk is next to the printer.
The sheep were standing in the shade.
Have you ever been inside that castle?
The stairs are steep, so hold the rail.
She poured the batter into a round pan.
The weather will be better by the weekend.
I hope that your mother feels better soon.
They waited for hours, but nobody came.
""".splitlines()
