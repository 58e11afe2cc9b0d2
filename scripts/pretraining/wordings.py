"""How questions are worded, and by which words of a text a topic is known."""

import re

INPUTS = 6 * ("title:{title},abstract:{text}",) + (
    "title: {title}\nabstract: {text}",
    "Title: {title}. Abstract: {text}",
    "{title}\n{text}",
)
WITHOUT_TITLE = 3 * ("abstract:{text}",) + ("title:,abstract:{text}", "text: {text}", "{text}")
# Pairs that swap their meaning ("0" for yes) are left out: a base this small then learns no answer at all.
ANSWERS = 8 * (("1", "0"),) + 3 * (("yes", "no"),) + (("Yes", "No"), ("true", "false"), ("right", "wrong"))
CLAIMS = (
    "Decide whether {claim}. Answer {yes} or {no}.",
    "Does it hold that {claim}? Write {yes} if so, {no} if not.",
    "Say if {claim}; {yes} means that it is so, {no} that it is not:",
    "Is it true that {claim}? {yes} or {no}",
    "Read the paper below and output {yes} if {claim}, else {no}.",
    "Here are title and abstract of a paper. Output {yes} where {claim} and {no} otherwise -->",
    "Please tell from the text whether {claim}, output {yes} or {no}, the text follows:",
    "{yes}: {claim}. {no}: it is not so. Which of the two?",
)
LIFE = (
    "this is from the life sciences",
    "the paper is about biology or health",
    "the authors work on medicine or biology",
    "the topic is living beings, their diseases or their treatment",
    "it was published in a biomedical journal",
)
EXACT = (
    "this is from computing, astronomy or engineering",
    "the paper is about machines, mathematics, physics or the sky",
    "the authors work on computers, algorithms or physics",
    "the topic is outside of biology and health",
)
MATCHES = (
    "the title belongs to the abstract",
    "title and abstract are of the same paper",
    "this abstract was written under this title",
)
TITLES = ("Give the paper a title.", "Which title has this paper?", "Write the title of the text:", "What is it about?")
WORDS = (
    "Some words were taken out of the text. For each word below it answer {yes} if it is one of them, else {no}.",
    "Say of every word behind the text whether it is likely in it, {yes} or {no}:",
)
TOPICS_BELOW = (
    "For each topic below the text answer {yes} if the paper is about it, else {no}.",
    "Which topics has this paper? Behind each stands {yes} or {no}:",
)
# A paper is about a topic if its text has at least two of these words, and not about it if it has none; a star stands
# for any ending.
TOPICS = {
    "cancer": "cancer* tumo* carcino* oncolog* chemother* metasta* lymphom* leuk* malignan*",
    "heart and vessels": "cardi* heart hypertens* coronary vascul* arter* myocard* ventric* aort* angina",
    "brain and nerves": "brain neuron* neurolog* cortex cerebr* seizure* epilep* dementia parkinson* alzheimer*",
    "mental health": "depressive anxi* psychiat* schizo* suicid* antidepress* antipsych* mood",
    "infections": "infect* virus* viral bacteri* antibiotic* vaccin* hiv sepsis pathogen*",
    "genes and proteins": "gene genes genetic* genom* protein* mutation* mrna dna transcription* phosphoryl*",
    "cells": "cell cells cellular membrane* receptor* cytokin* apopto* macrophag* epitheli* stem",
    "animals in experiments": "rat rats mouse mice rodent* rabbit* dogs zebrafish",
    "clinical trials": "placebo* randomi* double-blind patients efficacy tolerab* dosage*",
    "diabetes and weight": "diabet* insulin glucose obes* glyc* metformin overweight",
    "stomach and bowel": "gastr* intestin* colon bowel ulcer* reflux pylori liver hepat*",
    "pain": "pain* analges* opioid* morphine headache* migraine* nociceptive an*sthe*",
    "kidney and urine": "renal kidney* urin* bladder nephro* dialysis incontinence",
    "breathing": "asthma* lung* pulmon* respirat* airway* copd bronch*",
    "women and birth": "pregnan* women birth maternal estrogen* menopaus* fetal uter*",
    "children": "child children infant* p*diatric* adolescen* boys girls",
    "ways of living": "employ* lifestyle* smoking exercise diet* self-management counseling interventions",
    "drugs and side effects": "drug drugs adverse pharmac* dose doses toxic*",
    "surgery": "surg* operative postoperat* transplant* implant*",
    "images": "image images pixel* segmentation vision visual camera*",
    "videos": "video videos frames temporal motion",
    "language": "language languages sentence* translation linguist* words corpus",
    "language models": "llm llms prompt* token* transformer* pretrain* instruction",
    "speech and sound": "speech audio acoustic* speaker* voice* music* sound*",
    "robots and driving": "robot* vehicle* driving autonomous navigat* lidar",
    "games and rewards": "reinforcement reward* agent agents policy game games",
    "graphs": "graph graphs nodes edges topolog*",
    "galaxies": "galax* redshift* halo* quasar* cosmolog* agn",
    "stars": "star stars stellar supernova* dwarf* binaries",
    "planets": "planet* exoplanet* orbit* disk disks asteroid* comet*",
    "telescopes": "telescope* photometr* spectroscop* observatory x-ray radio",
    "particles and waves": "neutrino* gravitational quantum relativ* photon* magneti* plasma*",
    "software": "software programs developers engineer* requirements testing",
    "proofs and logic": "theorem* proof* logic* complexity polynomial* algebra*",
    "statistics": "bayes* regression estimator* likelihood* statistic* variance*",
    "training neural networks": "gradient* layers overfit* convolution* backpropagation neural",
}
PATTERNS = {
    topic: re.compile(rf"\b(?:{'|'.join(words.replace('*', '[a-z]*').split())})\b", re.IGNORECASE)
    for topic, words in TOPICS.items()
}
REVIEWS = {
    "ACEInhibitors": "ACE inhibitors",
    "ADHD": "attention deficit disorder",
    "Antihistamines": "antihistamines",
    "AtypicalAntipsychotics": "antipsychotics",
    "BetaBlockers": "beta blockers",
    "CalciumChannelBlockers": "calcium channel blockers",
    "Estrogens": "estrogens and hormones",
    "Kitchenham_2010": "software and computing",
    "NSAIDS": "drugs against inflammation",
    "Nagtegaal_2019": "changes of health behaviour",
    "Opiods": "opioids and pain",
    "OralHypoglycemics": "drugs against diabetes",
    "ProtonPumpInhibitors": "stomach acid and ulcers",
    "SkeletalMuscleRelaxants": "relaxing muscles",
    "Triptans": "migraine",
    "UrinaryIncontinence": "incontinence",
    "Bannach-Brown_2019": "depression in animals",
}
