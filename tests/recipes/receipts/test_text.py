"""Words of the receipts recipe: what a question asks, an answer says, and a tokenizer adds."""

import json

import pytest

from mmjax.data import tokenizers
from mmjax.errors import UserError
from mmjax.recipes.receipts import text


@pytest.mark.parametrize(
    ('question', 'kind', 'same', 'other'),
    [
        ('How many receipts?', 'count', ('I see 2.', 'There are two.', 'A pair: two'), 'No two, 3'),
        ('How many receipts?', 'count', ('Twenty-one', 'there are 21', 'twenty one'), '20 and one'),
        ('How many items?', 'items', ('thirteen', '13'), 'thirty'),
        ('Count the receipts', 'count', ('Forty', '40 of them'), 'fourteen'),
        ('Please count the receipts', 'count', ('There is a receipt.', 'One.', '01'), 'None.'),
        ('The number of receipts?', 'count', ('It does not show any.', 'No receipts', '0'), 'an'),
        ('Can you see a receipt?', 'exist', ('Yes, one.', 'yes'), 'No, two.'),
        ('How much was it?', 'total', ('RM 1,234.50 in all', '1234.5', '$1,234.50'), '1234.05'),
        ('Which total is on it?', 'total', ('It is 7.', '7.00', '7,00 EUR'), '70'),
        ('When was it bought?', 'date', ('On 05/3/2018.', 'dated 5-03-2018'), '5/3/2017'),
        ('What is the date?', 'date', ('It is 21 MAR 2018', '21 March 2018'), '21 MAY 2018'),
        (
            'Who issued it?',
            'store',
            ('It was issued by A & B 99 (M) Ltd.', 'a b 99 m ltd'),
            'a b m',
        ),
        ('How was it paid?', 'payment', ('By card.', 'They used a card'), 'In cash'),
        ('How many items?', 'items', ('Four of them', '4 items'), 'Five'),
        ('What colour is it?', 'other', ('It is Red.', 'it is red'), 'It is blue'),
    ],
)
def test_what_a_question_asks_and_an_answer_says(question, kind, same, other):
    assert text.kind(question) == kind
    assert len({text.content(kind, answer) for answer in same}) == 1
    assert text.content(kind, other) != text.content(kind, same[0])
    # An answer that says nothing of what was asked agrees with its own words alone.
    assert text.content(kind, 'Hm, ...') == text.content(kind, 'hm') != text.content(kind, 'Well')


def test_plain_tokens_leave_out_what_the_tokenizer_adds():
    plain = tokenizers.train_tokenizer(['two receipts'] * 2, 270)
    model = json.loads(plain.__getstate__())
    opened = json.loads(json.dumps(model))
    del opened['post_processor']['single'][2]  # opens texts, and does not close them
    bare = model | {'post_processor': None}
    for serialized, own, closing in (
        (model, 2, 3),
        (opened, None, 0),
        (bare, None, 0),
        (opened, 2, 2),
        (bare, 3, 3),
    ):
        tokenizer = tokenizers.Tokenizer(json.dumps(serialized))
        found, closed = text.plain_tokens(tokenizer, ['two receipts', '', 'two'], 40, own)
        assert closed == closing and len(found[1]) == 0 < len(found[2]) < len(found[0])
        assert tokenizer.decode(found[0]).strip() == 'two receipts'
        assert min(map(min, (found[0], found[2]))) > 3
        assert len(text.plain_tokens(tokenizer, ['two receipts'], 3)[0][0]) == 3
    with pytest.raises(UserError, match=r"token 40 cannot: it is the text '.'"):
        text.plain_tokens(tokenizer, ['two'], 8, 40)
