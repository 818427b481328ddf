"""Tasks of one's own: the TOML file, its mistakes, and a run from it."""

import json
import tomllib

import numpy as np
import pytest
from tiny import Silent

import jaxlora
from jaxlora.data import delimited, tables
from jaxlora.data.task_files import TaskSpec, paper_specs, read_tasks
from jaxlora.tasks.task import Task
from jaxlora.training import run as train
from jaxlora.training.config import Settings
from jaxlora.training.presets import make_settings, pace
from jaxlora.utils.errors import UserError

TOPIC = """
[topic]
kind = "classification"
classes = ["sport", "science"]
text = "headline"
label = "what"
train = "topic-train.csv"
dev = "topic-dev.csv"
"""
PRICE = """
[price]
kind = "regression"
range = [-10, 90.5]
text = ["first", "second"]
label = "euro"
id = "key"
delimiter = ";"
train = "price.txt"
dev = "price.txt"
test = "price-test.txt"
metric = "spearman"
weight = 0.5
learning_rate = 0.01
epochs = 3
patience = 2
"""


@pytest.fixture
def folder(tmp_path):
    """Two tasks of very different sizes; two rows of the first have no label."""
    words = ("goal", "team", "match"), ("atom", "cell", "light")
    rows = [f"the {words[n % 2][n % 3]} was good,{('sport', 'science')[n % 2]}" for n in range(50)]
    rows[7] = rows[8] = '"the film, or not",'
    (tmp_path / "topic-train.csv").write_text("\n".join(["headline,what", *rows]) + "\n")
    (tmp_path / "topic-dev.csv").write_text("\n".join(["headline,what", *rows[:6]]) + "\n")
    rows = [f"k{n};a dog {n};a cat;{n * 10 - 10}" for n in range(8)]
    (tmp_path / "price.txt").write_text("\n".join(["key;first;second;euro", *rows]) + "\n")
    rows = [row.rsplit(";", 1)[0] for row in rows[:3]]
    (tmp_path / "price-test.txt").write_text("\n".join(["key;first;second", *rows]) + "\n")
    return tmp_path


def write(folder, text):
    path = folder / "tasks.toml"
    path.write_text(text)
    return str(path)


def test_a_file_is_read(folder):
    topic, price = read_tasks([write(folder, TOPIC + PRICE)])
    assert topic.task == Task("topic", "classification", classes=("sport", "science"))
    assert (topic.weight, topic.own, topic.table.test) == (1.0, (), None)
    assert price.task == Task(
        "price", "regression", pair=True, low=-10, high=90.5, metric="spearman"
    )
    assert price.weight == 0.5
    assert dict(price.own) == {"learning_rate": 0.01, "epochs": 3, "patience": 2}
    assert price.table.files["test"] == folder / "price-test.txt"


def test_the_papers_tasks_are_three_such_descriptions():
    assert [d.task.kind for d in paper_specs("mse", 1.0)] == [
        "classification", "binary", "similarity",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (TOPIC.replace("kind", "kinde"), ["[topic]: kinde: unknown field", "did you mean kind"]),
        (TOPIC.replace('label = "what"\n', ""), ["[topic]: label: missing"]),
        (
            TOPIC.replace('"classification"', '"ranking"'),
            ["kind: must be 'class", "regression", "not 'ranking'"],
        ),
        (
            TOPIC.replace('["sport", "science"]', "1"),
            ["classes: must be", "equal to 2 or a list, not 1"],
        ),
        (
            TOPIC.replace('["sport", "science"]', '"sport"'),
            ["classes: must be a whole number or a list, not 'sport'"],
        ),
        (TOPIC.replace('["sport", "science"]', "20000"), ["10000 or a list, not 20000"]),
        (TOPIC.replace('["sport", "science"]', '["sport", " "]'), ["a name is blank"]),
        (
            TOPIC.replace('["sport", "science"]', '["sport", 2.5]'),
            ["classes.1: must be a string or a whole number, not 2.5"],
        ),
        (TOPIC.replace("topic-dev.csv", "gone.csv"), ["[topic] dev", "gone.csv"]),
        (TOPIC.replace("[topic]", '["a/b"]'), ["'a/b' cannot be a name"]),
        (TOPIC.replace("[topic]", '[".."]'), ["'..' cannot be a name"]),
        (TOPIC.replace("[topic]", '["a\\u0007"]'), ["cannot be a name"]),
        (TOPIC.replace("[topic]", f"[{'x' * 300}]"), ["cannot be a name", "xxx…"]),
        (TOPIC.replace("[topic]", ""), ["outside a task's table"]),
        (TOPIC + "epochs = 0", ["epochs: must be greater than or equal to 1, not 0"]),
        (TOPIC + "epochs = 1.5", ["epochs: must be a whole number, not 1.5"]),
        (TOPIC + "learning_rate = -1", ["learning_rate: must be greater than 0, not -1"]),
        (TOPIC + "learning_rate = nan", ["learning_rate: must be a finite number, not nan"]),
        (TOPIC + "weight = true", ["weight: must be a number, not True"]),
        (TOPIC + 'delimiter = "ab"', ["delimiter"]),
        (TOPIC + 'metric = "bleu"', ["metric 'bleu' does not go with classification"]),
        (TOPIC + "range = [0, 1]", ["[topic]: range", "name the classes"]),
        (TOPIC.replace('"headline"', '["a", "b", "c"]'), ["two for pairs, not 3"]),
        (PRICE.replace("[-10, 90.5]", "[5, 5]"), ["5 to 5 is empty"]),
        (PRICE.replace("[-10, 90.5]", "[5]"), ["range: has too few items"]),
        ("[topic", ["not a TOML file"]),
        ("", ["describes no task"]),
    ],
)
def test_mistakes_are_named(folder, text, fragments):
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        read_tasks([path])
    assert all(fragment in str(caught.value) for fragment in [str(path), *fragments])
    assert str(caught.value).count(str(path)) == 1


def test_a_task_by_flags_alone(folder):
    (from_file,) = read_tasks([write(folder, PRICE)])
    keys = tomllib.loads(PRICE)["price"]
    flags = []
    for key, value in keys.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flags.append(f"price.{key}={folder / text if key in ('train', 'dev', 'test') else text}")
    (by_flags,) = read_tasks(flags)
    assert by_flags == from_file


def test_what_a_file_leaves_open_is_found_in_the_data(folder):
    open_topic = "\n".join(
        line for line in TOPIC.splitlines() if line.split()[:1] not in (["kind"], ["classes"])
    )
    (topic,) = read_tasks([write(folder, open_topic)])
    assert topic.task == Task("topic", "binary", classes=("science", "sport"))
    kind = TOPIC.replace('classes = ["sport", "science"]\n', "")
    (topic,) = read_tasks([write(folder, kind)])
    assert topic.task == Task("topic", "classification", classes=("science", "sport"))
    (price,) = read_tasks([write(folder, PRICE.replace("range = [-10, 90.5]", ""))])
    assert (price.task.low, price.task.high) == (-10, 60)
    with pytest.raises(
        UserError, match=r"topic-train.csv:2: column 'what': label 'sport' is not a n"
    ):
        read_tasks([write(folder, kind.replace("classification", "regression"))])


def test_a_dev_set_is_held_out(folder, tiny):
    from jaxlora.training import inputs

    held = TOPIC.replace('dev = "topic-dev.csv"\n', "")
    for more, share in (("", 0.2), ("dev = 0.5", 0.5)):
        settings = make_settings(tasks=(write(folder, held + more),))
        table = settings.tasks[0].table
        assert table.dev == share
        assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
        rows = tables.read_splits(settings.tasks[0].task, table)
        assert not {r.sentence1 for r in rows["train"]} & {r.sentence1 for r in rows["dev"]}
        splits = inputs.load_data(settings, tiny)["topic"]
        ids = [*splits["train"].ids, *splits["dev"].ids]
        assert len(set(ids)) == len(ids) == 48  # two rows have no label
        assert list(splits["dev"].ids) == [row.id for row in rows["dev"]]
    (spec,) = read_tasks([write(folder, held), "topic.dev=0.25"])
    assert spec.table.dev == 0.25
    with pytest.raises(UserError, match="dev: must be a string or less than 1"):
        read_tasks([write(folder, held), "topic.dev=1.5"])


def test_a_table_alone_is_a_task(folder):
    path = str(folder / "topic-train.csv")
    (topic,) = read_tasks([path, "topic-train.epochs=7"], "headline", "what")
    assert topic.task == Task("topic-train", "binary", classes=("science", "sport"))
    assert (topic.own, topic.table.dev) == ((("epochs", 7),), 0.2)
    (pair,) = read_tasks([str(folder / "price.txt")], "first,second", "euro")
    assert pair.task == Task("price", "regression", pair=True, low=-10, high=60)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("headline", None, r"`label`: name the column of .*there are headline, what"),
        (None, "what", r"`text`: name the column"),
        ("headline", "waht", r"topic-train.csv:1: no column waht \(did you mean 'what'\?\)"),
        ("what", "headline", "column 'headline'"),
        ("haedline", "what", r"topic-train.csv:1: no column haedline \(did you mean 'headline'"),
    ],
)
def test_columns_of_a_table_that_are_wrong(folder, text, label, message):
    rows = [f"the goal number {n},sport" for n in range(40)]
    (folder / "topic-train.csv").write_text("\n".join(["headline,what", *rows]))
    with pytest.raises(UserError, match=message) as caught:
        read_tasks([str(folder / "topic-train.csv")], text, label)
    assert str(caught.value).count("topic-train.csv:1") <= 1


@pytest.mark.parametrize("columns", [(None, None), ("a", "b")])
def test_an_empty_table_needs_no_other_delimiter(folder, columns):
    (folder / "topic-train.csv").write_text("")
    with pytest.raises(UserError, match="is empty") as caught:
        read_tasks([str(folder / "topic-train.csv")], *columns)
    assert "tab-separated" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("topci.epochs=2", "there is no task topci; did you mean topic"),
        ("x.text=headline", "there is no task x; there are price, topic"),
    ],
)
def test_values_of_a_task_that_no_file_describes(folder, value, message):
    with pytest.raises(UserError, match=message):
        read_tasks([value, write(folder, TOPIC + PRICE)])
    whole = [f"new.train={folder / 'topic-train.csv'}", "new.text=headline", "new.label=what"]
    assert len(read_tasks([*whole, "new.dev=0.2", write(folder, TOPIC)])) == 2


def test_a_column_of_labels_that_never_changes_is_refused_before_anything_runs(folder):
    rows = [f"the goal number {n},sport" for n in range(40)]
    (folder / "topic-train.csv").write_text("\n".join(["headline,what", *rows]))
    with pytest.raises(UserError, match="every row has the label 'sport'"):
        read_tasks([str(folder / "topic-train.csv")], "headline", "what")
    (spec,) = read_tasks([write(folder, TOPIC)])  # classes are given, and all rows have the first
    with pytest.raises(UserError, match="every row has the same label in column 'what'"):
        tables.read_splits(spec.task, spec.table)


def test_columns_by_flags_are_for_tables(folder):
    with pytest.raises(UserError, match="`label`: is for a table such as tickets"):
        read_tasks([write(folder, TOPIC)], None, "what")


def test_flags_change_what_a_file_says(folder):
    path = write(folder, TOPIC + PRICE)
    topic, price = read_tasks(["topic.epochs=7", "topic.classes=sport,science,3", path])
    assert topic.own == (("epochs", 7),)
    assert topic.task.classes == ("sport", "science", "3")
    assert price == read_tasks([path])[1]


def test_names_of_classes_stay_as_they_are_written(folder):
    for names in ("01,02", "nan,1.5", "1e3,+1"):
        (topic,) = read_tasks([write(folder, TOPIC), f"topic.classes={names}"])
        assert topic.task.classes == tuple(names.split(","))
    (topic,) = read_tasks([write(folder, TOPIC), "topic.classes=3"])
    assert topic.task.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("topic.epoch=3", "epoch: unknown field; did you mean epochs"),
        ("topic.epochs=x", "epochs: must be a whole number, not 'x'"),
        ("topic.epochs=1.5", "epochs: must be a whole number, not 1.5"),
        ("tropic.epochs=3", "`tasks`: there is no task tropic; did you mean topic?"),
        ("../x.epochs=3", "`tasks`: '../x' cannot be a name"),
        ("topic.class_weights.sport=2", r"class_weights has no keys here; write it in \[topic\]"),
        ("topic.dev=none.csv", "there is no file .*none.csv"),
        ("topic.train=", "train: is empty; name a table"),
        ("topic.test= ", "test: is empty; name a table"),
        ("9" * 5000, "the path is too long"),  # longer than a file's name may be
        ("epochs=3", "`tasks` epochs=3: cannot be read"),
    ],
)
def test_mistakes_in_flags(folder, value, message):
    with pytest.raises(UserError, match=message):
        read_tasks([write(folder, TOPIC), value])


def test_a_task_is_described_once(folder):
    path = write(folder, TOPIC)
    with pytest.raises(UserError, match=r"\[topic\] is defined in .*tasks.toml as well"):
        read_tasks([path, path])


def test_flags_that_do_not_go_with_a_file_of_tasks(folder):
    path = write(folder, TOPIC)
    with pytest.raises(UserError, match="`sts_weight`"):
        make_settings("lora1", tasks=(path,), sts_weight=2.0)
    with pytest.raises(UserError, match="`data_dir`: goes with"):
        make_settings("lora1", tasks=(path,), data_dir=folder)
    with pytest.raises(UserError, match="`source='files'`"):
        make_settings("lora1", source="files")
    with pytest.raises(UserError, match="`tasks`: name at least one"):
        make_settings("lora1", tasks=(), groups="a")
    with pytest.raises(UserError, match="cannot be read"):
        make_settings("lora1", tasks=(str(folder / "none.toml"),))
    with pytest.raises(UserError, match=r"unknown task 'sst' \(topic, price"):
        make_settings("lora1", tasks=(write(folder, TOPIC + PRICE),), groups="sst|topic,price")


def test_a_group_has_its_tasks_own_settings(folder):
    path = write(folder, TOPIC + PRICE)
    apart = make_settings("lora1", tasks=(path,))
    assert Settings.from_json(json.loads(json.dumps(apart.to_json()))) == apart
    assert isinstance(apart.tasks[1], TaskSpec)
    assert apart.of_group(("price",)).loop.epochs == 3
    assert apart.of_group(("topic",)).loop.epochs == pace(50 - 2, 16)["epochs"] != 3
    assert apart.of_group(("price",)).optimizer.learning_rate == 0.01
    with pytest.raises(UserError, match="must agree on epochs"):
        make_settings("lora3", tasks=(write(folder, TOPIC + "epochs = 2\n" + PRICE),))


@pytest.mark.parametrize(
    "variant", ["lora4", *(pytest.param(v, marks=pytest.mark.slow) for v in ("baseline1", "lora1"))]
)
def test_a_run_trains_and_serves_them(folder, tiny_base, variant):
    path = write(folder, TOPIC + PRICE.replace("learning_rate = 0.01\n", ""))
    settings = make_settings(
        variant, tasks=(path,), base=str(tiny_base), batch_size=6, max_steps=5, max_length=32
    )
    callback = Silent()
    result = train.run(settings, folder / "run", callback)
    assert callback.summaries[0].unlabelled == {"topic": 2, "price": 0}
    assert callback.summaries[0].examples["topic"] == {"train": 48, "dev": 6, "test": 0}
    assert result["metrics"] == {"topic": "topic accuracy", "price": "price Spearman ρ"}
    written = {p.name for p in (folder / "run" / "predictions").iterdir()}
    assert written == {"topic-dev.csv", "price-dev.csv", "price-test.csv"}
    lines = (folder / "run" / "predictions" / "price-test.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "k0", "k1", "k2"]
    assert all(-10 <= float(line.split(",")[1]) <= 90.5 for line in lines[1:])
    topic, price = jaxlora.load(folder / "run")([("topic", "the goal"), ("price", "a", "b")])
    assert topic.label in ("sport", "science")
    assert sum(topic.probabilities.values()) == pytest.approx(1)
    assert topic.probabilities[topic.label] == max(topic.probabilities.values())
    assert (price.label, price.probabilities) == (None, None)


def test_an_edited_table_is_read_anew(folder, tiny):
    from jaxlora.training import inputs

    path = write(folder, PRICE)
    settings = make_settings("lora1", tasks=(path,))
    before = inputs.load_data(settings, tiny)["price"]["dev"].labels
    text = (folder / "price.txt").read_text().replace(";60\n", ";90\n")
    (folder / "price.txt").write_text(text)
    after = inputs.load_data(settings, tiny)["price"]["dev"].labels
    assert np.flatnonzero(before != after).tolist() == [7]


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("a,b", ","), ("a\tb,c", None), ("a;b;c,d", ";"), ("a|b", "|"), ("alone", "\t")],
)
def test_the_delimiter_is_found_out(tmp_path, header, delimiter):
    path = tmp_path / "x"
    if delimiter is None:
        with pytest.raises(UserError, match="cannot tell what separates"):
            delimited.sniff(header, path)
    else:
        assert delimited.sniff(header + "\n1,2;3\t4|5|6|7|8", path) == delimiter


def test_a_label_column_that_is_there_twice(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,label,label\nx,0,1\n")
    columns = tables.Columns(("a",), "label")
    task = Task("topic", "classification", classes=("0", "1"))
    for labelled in (True, None):
        with pytest.raises(UserError, match=r"label occurs twice"):
            tables.read(task, path, columns, labelled=labelled)
    tables.read(task, path, columns, labelled=False)


def test_the_ends_of_a_range_belong_to_it(tmp_path):
    """118.8 as a double is below the decimal number 118.8."""
    path = tmp_path / "x.csv"
    path.write_text("t,l\na,118.8\nb,-16.6\n")
    task = Task("x", "regression", low=-16.6, high=118.8)
    rows = tables.read(task, path, tables.Columns(("t",), "l"))
    assert [row.label for row in rows] == [118.8, -16.6]


def test_labels_by_name_and_by_number(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("t,l\na,2\nb,1.0\nc,3\n")
    columns = tables.Columns(("t",), "l")
    task = Task("x", "classification", classes=("1", "2", "3"))
    assert [row.label for row in tables.read(task, path, columns)] == [1, 0, 2]
    words = Task("x", "classification", classes=("no", "yes", "maybe"))
    path.write_text("t,l\na,yes\nb,2\nc,no\n")
    assert [row.label for row in tables.read(words, path, columns)] == [1, 2, 0]
    path.write_text("t,l\na,yes\nb,perhaps\n")
    with pytest.raises(UserError, match=r"x\.csv:3: label 'perhaps' is not one of no, yes, maybe"):
        tables.read(words, path, columns)


def test_a_tilde_is_the_home_folder_in_tables_and_task_files(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    text = TOPIC.replace('"topic-train.csv"', '"~/topic-train.csv"')
    write(folder, text)
    value = "topic.train=~/topic-train.csv"
    for given in (["~/tasks.toml"], ["~/topic-train.csv"], ["~/tasks.toml", value]):
        columns = () if given[0].endswith("toml") else ("headline", "what")
        (spec,) = read_tasks(given, *columns)
        assert spec.table.train == str(folder / "topic-train.csv")
