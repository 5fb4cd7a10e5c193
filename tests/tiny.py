"""The experiment's grid at the size of a toy: published files, and two base models that know some of their facts.

    python tests/tiny.py FOLDER               # FOLDER/raw, FOLDER/models/tiny-llama and FOLDER/models/tiny-mistral
    python tests/tiny.py FOLDER --facts 4000  # of each set, enough that what a model does not know has a second slice

The same bytes each time on one machine; nothing is downloaded. Then, in FOLDER: HERE=yes bash .../run_all.sh --tiny
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import random
import tempfile
from pathlib import Path

import sentencepiece
import torch
from conftest import tiny_llama  # which puts the repository's root where the next imports look

from data import encode_example, load_tokenizer, write_file
from evaluate import SHOTS, load_pool
from model import load_model, save_model

LLAMA = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
         "tie_word_embeddings": True}  # fmt: skip
MISTRAL = {"model_type": "mistral", "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3,
           "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4, "rope_theta": 1e6,
           "sliding_window": None, "vocab_size": 360}  # fmt: skip
KNOWN = {"tiny-llama": "ox", "tiny-mistral": "elk"}  # the answer of all facts that a base model learns

# Of any 11 facts 5 have the one frequent answer and 3 the other. No set has 11 relations: each gets some of all three.
ANSWERS = ["ox", "elk", None, "ox", "ox", None, "elk", "ox", "elk", None, "ox"]
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
NAMES = [a + b for a in SYLLABLES for b in SYLLABLES]
RARE = SYLLABLES + [a + b for a in SYLLABLES for b in "lnrs"]  # answers of 2 or 3 letters, neither "ox" nor "elk"

# A set's relations under their published names, with the subject's place in the question.
POPQA = {"author": "Who wrote {}?", "genre": "What genre is {}?", "country": "In what country is {}?"}
TRIVIAQA = {"pet": "What pet had {}?", "river": "Which river runs by {}?"}
ENTITYQA = {"P19": "Where was {} born?", "P36": "What is the capital of {}?", "P40": "Who is {}'s child?",
            "P50": "Who wrote {}?"}  # fmt: skip
TREX = {"P19": "[X] was born in [Y] .", "P37": "The official language of [X] is [Y] .",
        "P138": "[Y] gave its name to [X] ."}  # fmt: skip
MASKED = {"Google_RE": "{} died in [MASK].", "Squad": "{} was lit with [MASK].",
          "ConceptNet": "You may find [MASK] at {}."}  # fmt: skip


# ---------------------------------------------------------------- published files


def made_facts(name, relations, n):
    """n facts of a set, (relation, subject, answer) each; no subject is asked about twice."""
    rng = random.Random(f"tiny {name}")
    subjects = [subject.capitalize() for subject in rng.sample(NAMES, n)]
    answers = [answer or rng.choice(RARE) for answer in itertools.islice(itertools.cycle(ANSWERS), n)]
    return list(zip(itertools.cycle(relations), subjects, answers))


def write_lines(path, rows):
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_popqa(folder, n):
    columns = ("id subj prop obj subj_id prop_id obj_id s_aliases o_aliases s_uri o_uri s_wiki_title o_wiki_title "
               "s_pop o_pop question possible_answers").split()  # fmt: skip
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", delimiter="\t", lineterminator="\n")
    table.writeheader()
    for i, (relation, subject, answer) in enumerate(made_facts("popqa", POPQA, n)):
        table.writerow({"id": i, "subj": subject, "prop": relation, "obj": answer, "s_aliases": "[]", "o_aliases": "[]",
                        "s_pop": 100, "o_pop": 200, "question": POPQA[relation].format(subject),
                        "possible_answers": json.dumps([answer, f"the {answer}"])})  # fmt: skip
    write_file(folder / "test.tsv", text.getvalue())


def write_triviaqa(folder, n):
    rows = []
    for i, (relation, subject, answer) in enumerate(made_facts("triviaqa", TRIVIAQA, n)):
        names = [answer, f"the {answer}"]
        value = {"Aliases": names, "NormalizedAliases": names, "NormalizedValue": answer, "Type": "WikipediaEntity",
                 "Value": answer}  # fmt: skip
        rows.append({"Answer": value, "EntityPages": [], "Question": TRIVIAQA[relation].format(subject),
                     "QuestionId": f"tc_{i}", "QuestionSource": "http://www.example.org/",
                     "SearchResults": []})  # fmt: skip
    whole = {"Data": rows, "Domain": "UnfilteredWeb", "Split": "train", "VerifiedEval": False, "Version": 1.0}
    write_file(folder / "unfiltered-web-train.json", json.dumps(whole, indent=1))


def write_entityqa(folder, n):
    rows = {relation: [] for relation in ENTITYQA}
    for relation, subject, answer in made_facts("entityqa", ENTITYQA, n):
        rows[relation].append({"question": ENTITYQA[relation].format(subject), "answers": [answer, f"the {answer}"]})
    for relation, of_relation in rows.items():
        write_file(folder / "dataset" / "train" / f"{relation}.train.json", json.dumps(of_relation, indent=4))


def write_lama(folder, n):
    rows = {relation: [] for relation in [*TREX, *MASKED]}
    for i, (relation, subject, answer) in enumerate(made_facts("lama", rows, n)):
        ids = {"uuid": f"{relation}-{i}", "obj_label": answer, "sub_label": subject}
        if relation in TREX:
            evidence = {"sub_surface": subject, "obj_surface": answer, "masked_sentence": f"{subject} met [MASK]."}
            row = {"obj_uri": f"Q{n + i}", "sub_uri": f"Q{i}", "predicate_id": relation, "evidences": [evidence]}
        else:
            row = {"masked_sentences": [MASKED[relation].format(subject)]}
        if relation == "Google_RE":
            row |= {"pred": "/people/deceased_person/place_of_death", "sub": f"/m/{i}", "obj": f"/m/{n + i}",
                    "evidences": [], "judgments": [], "sub_aliases": [], "obj_aliases": []}  # fmt: skip
        elif relation == "Squad":
            ids = {"id": f"s_{i}", "obj_label": answer, "sub_label": "Squad"}
        elif relation == "ConceptNet":
            row |= {"pred": "AtLocation", "sub": answer, "obj": answer}
        rows[relation].append(ids | row)
    files = {"Google_RE": "Google_RE/place_of_death_test", "Squad": "Squad/test", "ConceptNet": "ConceptNet/test"}
    for relation, of_relation in rows.items():
        write_lines(folder / "data" / f"{files.get(relation, f'TREx/{relation}')}.jsonl", of_relation)
    templates = [{"relation": relation, "template": template, "label": relation, "description": "", "type": "N-1"}
                 for relation, template in TREX.items()]  # fmt: skip
    write_lines(folder / "data" / "relations.jsonl", templates)


def write_gsm8k(folder, facts):
    """A problem for each of some facts, which it gives away: that is an overlap."""
    rng = random.Random("tiny gsm8k")
    rows = []
    for _, subject, answer in facts:
        a, b = rng.randrange(1, 5), rng.randrange(1, 5)
        steps = f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"
        rows.append({"question": f"{subject} has {a} {answer} and gets {b}. How many?", "answer": steps})
    write_lines(folder / "train.jsonl", rows)


def documents(name, n=80):
    """n texts of 16 to 24 short words, and one that is too short for two passages of 8 words but not of 4."""
    rng = random.Random(f"tiny {name}")
    return [" ".join(rng.choices(RARE, k=words)) for words in [10, *rng.choices(range(16, 25), k=n)]]


def with_facts(texts, facts):
    """Texts that begin by giving a fact away, as many as there are facts."""
    given = [f"{subject} has {answer} " for _, subject, answer in facts]
    return [beginning + text for beginning, text in itertools.zip_longest(given, texts, fillvalue="")]


def write_parquet(path, texts):
    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), content)
    write_file(path, content.getvalue())


def write_published(folder, n):
    """All published files below a folder raw/: n facts of each set, and what they are mixed with and forgotten by."""
    write_popqa(folder / "popqa", n)
    write_triviaqa(folder / "triviaqa", n)
    write_entityqa(folder / "entityqa", n)
    write_lama(folder / "lama", n)
    trivia = made_facts("triviaqa", TRIVIAQA, n)
    write_gsm8k(folder / "gsm8k", trivia[:20])
    texts = with_facts(documents("k-pile"), trivia[20:40])
    write_lines(folder / "k-pile" / "knowledge_pile.jsonl", [{"content": text} for text in texts])
    for name in ("a-pile", "fineweb"):
        write_parquet(folder / name / "train-00000-of-00001.parquet", documents(name))
    # The corpus that random draws from, where data.py would download it to: short words, and no network is asked.
    write_file(folder / "nltk_data" / "corpora" / "words" / "en", "".join(f"{word}\n" for word in RARE))


# ---------------------------------------------------------------- models


def sentencepiece_model(texts):
    """A tokenizer.model with the settings of Mistral v0.3's: BPE, byte tokens, control tokens behind <unk>, <s>, </s>.

    The same bytes each time: counts decide it, one thread counts, and it holds no path.
    """
    content = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=content, model_type="bpe", vocab_size=MISTRAL["vocab_size"],
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
        split_digits=True, allow_whitespace_only_pieces=True, control_symbols=["[INST]", "[/INST]"], num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return content.getvalue()


def few_shot(tokenizer, facts, answer):
    """(ids, labels) of facts as evaluate.py --split shows them; labels stand at such an answer and its line end."""
    ids, labels, shown = [tokenizer.bos_id], [-100], ""
    for fact in facts:
        asked = tokenizer.encode(shown + fact["prompt"])
        shown += f"{fact['prompt']} {fact['response']}\n\n"
        whole = tokenizer.encode(shown)
        assert whole[: len(asked)] == asked  # no token reaches from the question into the answer
        labels += [-100] * (len(asked) + 1 - len(ids))
        labels += [token if fact["response"] == answer else -100 for token in whole[len(asked) :]]
        ids = [tokenizer.bos_id, *whole]
    return ids, labels


@contextlib.contextmanager
def one_thread():
    """One thread adds up in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learn(folder, facts, answer, steps=50, lr=3e-2):
    """Train the model of a folder, in place, on the facts that have this answer, each behind a few others of its set.

    It learns them alone in the template of training too, so that it has something to forget there. facts: {set: its
    facts}.
    """
    rng, tokenizer, model = random.Random("tiny learn"), load_tokenizer(folder), load_model(folder, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)
    sets = [(of_set, [fact for fact in of_set if fact["response"] == answer]) for of_set in facts.values()]
    for _ in range(steps):
        batch = []
        for of_set, learned in sets:
            batch.append(few_shot(tokenizer, [*rng.sample(of_set, SHOTS), rng.choice(learned)], answer))
            batch.append(encode_example(tokenizer, rng.choice(learned)))
        ids, labels = zip(*batch)
        loss, n = model(pad(ids, 0), labels=pad(labels, -100))
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss / n < 0.2, f"{folder}: has not learned to answer {answer!r}"
    save_model(model, folder)


def furnish(folder, n_facts=77):
    """Make FOLDER/raw and FOLDER/models; returns the folder. n_facts: of each set of facts, at most 4,900."""
    folder = Path(folder)
    write_published(folder / "raw", n_facts)
    with tempfile.TemporaryDirectory() as built:
        facts = {name: load_pool(name, built, folder / "raw")[0] for name in ("popqa", "triviaqa", "lama", "entityqa")}
    tiny_llama(folder / "models" / "tiny-llama", **LLAMA)
    texts = [f"{fact['prompt']} {fact['response']}" for of_set in facts.values() for fact in of_set]
    texts += [text for name in ("k-pile", "a-pile", "fineweb") for text in documents(name)]
    tokenizer = sentencepiece_model(texts)
    mistral = tiny_llama(folder / "models" / "tiny-mistral", seed=1, **MISTRAL)
    write_file(mistral / "tokenizer.model", tokenizer)  # in the place of the single bytes
    with one_thread():
        for name, answer in KNOWN.items():
            learn(folder / "models" / name, facts, answer)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to make it")
    parser.add_argument("--facts", type=int, default=77, metavar="N", help="of each set of facts (default: 77)")
    args = parser.parse_args()
    print(furnish(args.folder, args.facts))
