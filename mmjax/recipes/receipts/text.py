"""Words of the receipts recipe: built-in questions with their answers, and the content of answers.

A question's wording fixes its answer's wording: only the content must come from the image. For a
user's data `kind` reads what a question asks for and `content` what an answer states, so that an
answer in other words can be right.
"""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.data.tokenizers import Tokenizer
from mmjax.errors import UserError

NUMBERS = (
    'no',
    'one',
    'two',
    'three',
    'four',
    'five',
    'six',
    'seven',
    'eight',
    'nine',
    'ten',
    'eleven',
    'twelve',
    'thirteen',
    'fourteen',
    'fifteen',
    'sixteen',
    'seventeen',
    'eighteen',
    'nineteen',
)
_TENS = ('twenty', 'thirty', 'forty', 'fifty', 'sixty', 'seventy', 'eighty', 'ninety')

# kind → (two wordings of the question, the answer); {it} is 'the receipt' or says which one. Of
# count and exist (no, yes) there is an answer a value. Answers are short, and other ones have few
# words in common: a guess that knows the question alone must not score well by its frame.
TEMPLATES = {
    'count': (
        (
            'How many receipts do you see?',
            'How many receipts can you see?',
            'None at all.',
            'I see one.',
            'Two receipts here.',
            'There are three.',
            'I see four.',
            'Five of them here.',
        ),
        (
            'How many receipts are in this picture?',
            'How many receipts are there?',
            'There are none.',
            'Just one receipt.',
            'I see two.',
            'Three of them.',
            'Four receipts.',
            'There are five.',
        ),
        (
            'Count the receipts.',
            'Please count all receipts.',
            'Nothing to count.',
            'One receipt only.',
            'I count two.',
            'Three in all.',
            'Four altogether.',
            'I count five.',
        ),
        (
            'What is the number of receipts?',
            'Tell me the number of receipts.',
            'It is zero.',
            'Just one.',
            'Exactly two receipts.',
            'There are three here.',
            'It is four.',
            'Exactly five.',
        ),
        (
            'How many receipts does the photo show?',
            'How many receipts lie there?',
            'No receipt at all.',
            'A single one.',
            'Two of them.',
            'Three receipts here.',
            'Four lie there.',
            'Five receipts.',
        ),
    ),
    'exist': (
        ('Is there a receipt?', 'Is there any receipt here?', 'No, none.', 'Yes, there is.'),
        (
            'Are any receipts visible?',
            'Are there any receipts in the picture?',
            'No, not one.',
            'Yes, I see some.',
        ),
        (
            'Does the photo show a receipt?',
            'Does this image contain any receipts?',
            'No, it shows other things.',
            'Yes.',
        ),
        ('Can you see a receipt?', 'Can you find any receipt?', 'No, I found none.', 'Yes, here.'),
        (
            'Is at least one receipt visible?',
            'Is one receipt or more to be seen?',
            'No.',
            'Yes, one or more.',
        ),
    ),
    'store': (
        ('Which store is {it} from?', 'From which shop is {it}?', 'From {store}.'),
        ('Where was {it} issued?', 'Who issued {it}?', '{store} issued it.'),
        ('What is the name of the store on {it}?', 'Name the store of {it}.', 'It is {store}.'),
        ('Which shop printed {it}?', 'Who printed {it}?', '{store} did.'),
        ('Where does {it} come from?', 'Which shop does {it} name?', '{store}.'),
    ),
    'items': (
        ('How many items are on {it}?', 'How many items can be read on {it}?', '{N} items.'),
        ('Count the items of {it}.', 'Please count the items on {it}.', 'I count {n}.'),
        (
            'What is the number of items on {it}?',
            'Tell me the number of items on {it}.',
            '{N} of them.',
        ),
        ('How many items does {it} list?', 'How many items does {it} have?', '{N}.'),
        ('How many items were bought on {it}?', 'How many items does {it} name?', '{N} in all.'),
    ),
    'total': (
        ('What is the total on {it}?', 'What total does {it} show?', '{t} dollars.'),
        ('How much was paid on {it}?', 'Which amount was paid on {it}?', '{t} in all.'),
        ('Can you read the total of {it}?', 'Please read the total of {it}.', 'I read {t}.'),
        ('How much does {it} come to?', 'Which sum does {it} come to?', 'To {t} dollars.'),
        ('What is the cost on {it}?', 'What did the purchase on {it} cost?', 'Just {t}.'),
    ),
    'payment': (
        ('How was {it} paid?', 'How did the buyer pay {it}?', 'By {p}.'),
        ('Which payment does {it} name?', 'What payment is on {it}?', '{P}, it says.'),
        ('What was used to pay {it}?', 'Tell me how {it} was paid.', 'With {p}.'),
        ('What was {it} paid with?', 'What did the buyer of {it} pay with?', '{P} was used.'),
        ('What is the payment on {it}?', 'Which way of payment is on {it}?', '{P}.'),
    ),
}
WORDINGS = 10  # of the questions of each kind


def template(kind: str, wording: int) -> int:
    """Returns the number of a built-in question, from 1; 0 is any question of a user's."""
    return 1 + WORDINGS * list(TEMPLATES).index(kind) + wording


def pair(kind: str, wording: int, it: str, value: int | str) -> tuple[str, str]:
    """Returns a built-in question and its answer.

    Args:
      kind: one of TEMPLATES.
      wording: from 0 to 9.
      it: how the question calls the receipt, such as 'the left receipt'.
      value: what is true: a number for count (0 to 5), exist (0, 1), items (0 to 10) and total,
        else words.
    """
    asked, answers = TEMPLATES[kind][wording // 2][wording % 2], TEMPLATES[kind][wording // 2][2:]
    if len(answers) > 1:
        return asked, answers[int(value)]
    said = NUMBERS[int(value)] if kind == 'items' else str(value)
    words = {'n': said, 't': said, 'p': said, 'store': said}
    words |= {'N': said.capitalize(), 'P': said.capitalize()}
    return asked.format(it=it), answers[0].format(**words)


_ASKED = (
    ('date', r'\b(dates?|dated|when|which day|what day)\b'),
    ('items', r'\b(items?|goods|articles|products)\b'),
    ('count', r'\b(how many|numbers? of|count)\b.*\breceipts\b'),
    ('exist', r'^(is|are|does|do|can|could|has|have)\b.*\b(a|any|one|some|an)\b.*\breceipts?\b'),
    ('total', r'\b(totals?|amounts?|how much|sum|cost|costs|price)\b'),
    ('payment', r'\b(pay|pays|paid|payment)\b'),
    ('store', r'\b(stores?|shops?|company|business|merchant|seller|vendor|where|who|issued)\b'),
)
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)} | {
    **{word: str(10 * tens) for tens, word in enumerate(_TENS, 2)},
    'none': '0',
    'zero': '0',
    'nothing': '0',
    'not': '0',
    'single': '1',
    'a': '1',
    'an': '1',
}
_WEAK = ('not', 'single', 'a', 'an')  # they count only where nothing else does
_PAYMENTS = ('cash', 'card', 'phone', 'cheque', 'check', 'credit', 'debit', 'voucher')
_MONTH = r'(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*'
_DATE = re.compile(
    r'\d{1,4}([/.-])\d{1,2}\1\d{1,4}'
    rf"|\d{{1,2}}[ -]?{_MONTH}[ ,.'-]*\d{{2,4}}|{_MONTH}\.? \d{{1,2}}[ ,.'-]+\d{{2,4}}"
)
_AROUND = frozenset(
    re.findall(
        r'\w+',
        'the it is was are from by at of on in a an this that and says store shop company business '
        'merchant receipt issued printed named name called purchase made',
    )
)


def words(text: str) -> list[str]:
    """Splits a text to lower-case words and numbers, punctuation left out."""
    return re.findall(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?", text.lower())


def kind(question: str) -> str:
    """Returns what a question asks for: count, exist, store, items, total, payment, date, other."""
    text = question.lower().strip()
    return next((name for name, pattern in _ASKED if re.search(pattern, text)), 'other')


def content(question_kind: str, answer: str) -> str:
    """Returns the content of an answer, in one form whatever its words.

    Two answers to a question agree if their contents are equal. The content of an answer without
    what the question asks for, and of every answer of kind 'other', is its words.

    Args:
      question_kind: what `kind` returns for the question.

    Returns:
      count, items: '2', read in words up to ninety-nine; exist: 'yes' or 'no'; total: '73.00',
      currency left out; payment: 'card'; date: '20-12-2017', separators, leading zeros and case
      left out; store: its words.
    """
    tokens = words(answer)
    return _READERS.get(question_kind, _other)(answer.lower(), tokens) or _other(answer, tokens)


def _other(text: str, tokens: list[str]) -> str:
    return ' '.join(tokens)


def _number(text: str, tokens: list[str]) -> str:
    numbers = [word for word in tokens if word.isdigit() or word in _NUMBER_WORDS]
    for tens, one in itertools.pairwise(tokens):  # twenty-five
        if tens in _TENS and one in NUMBERS[1:10]:
            return str(int(_NUMBER_WORDS[tens]) + int(_NUMBER_WORDS[one]))
    numbers.sort(key=lambda word: word in _WEAK and 1 + _WEAK.index(word))
    return _NUMBER_WORDS.get(numbers[0], numbers[0].lstrip('0') or '0') if numbers else ''


def _yes_or_no(text: str, tokens: list[str]) -> str:
    return next((word for word in tokens[:1] if word in ('yes', 'no')), '')


def _total(text: str, tokens: list[str]) -> str:
    number = next((word for word in tokens if word[0].isdigit()), '')
    if not number:
        return ''
    whole, comma, cents = number.rpartition(',')
    if comma and len(cents) != 3 and '.' not in number:  # a decimal comma
        number = f'{whole.replace(",", "")}.{cents}'
    try:
        return f'{float(number.replace(",", "")):.2f}'
    except ValueError:  # more than one point: a date, a version
        return ''


def _date(text: str, tokens: list[str]) -> str:
    match = _DATE.search(text)
    if not match:
        return ''
    parts = re.findall(r'\d+|[a-z]+', match[0])
    return '-'.join(part[:3] if part.isalpha() else part.lstrip('0') or '0' for part in parts)


def _store(text: str, tokens: list[str]) -> str:
    return ' '.join(word for word in tokens if word not in _AROUND)


def _payment(text: str, tokens: list[str]) -> str:
    return next((word for word in tokens if word in _PAYMENTS), '')


_READERS: Mapping = {
    'count': _number,
    'items': _number,
    'exist': _yes_or_no,
    'total': _total,
    'date': _date,
    'store': _store,
    'payment': _payment,
}


def plain_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], limit: int, closing: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Returns the tokens of each text, at most `limit`, and the token that closes texts.

    What the tokenizer puts around a text is left out. If it closes texts with no token of its own,
    they are closed with `closing`, or with its pad token if that is None.

    Raises:
      UserError: the closing token is text.
    """
    options = (tokenizer.end_id, closing, tokenizer.pad_id)
    closing = next(token for token in options if token is not None)
    if tokenizer.decode([closing]):
        raise UserError(
            f'the tokenizer closes no text, and token {closing} cannot: it is the text '
            f'{tokenizer.decode([closing])!r}'
        )
    ids, mask = tokenizer.encode(texts, limit, special=False)
    return [row[keep] for row, keep in zip(ids, mask, strict=True)], closing
