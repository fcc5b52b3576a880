"""Split captions into words as the published caption metrics do, without Java.

The metrics of COCO cut captions by Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and drop punctuation.
This gives the same tokens for plain English captions. Markup beyond a single tag, telephone numbers and smileys out of
the ordinary may be cut otherwise.
"""

import regex

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that the metrics leave out. They mean to leave out brackets too, but in capitals: `-lrb-` stays."""

ABBREVIATIONS = r"""adj|adm|adv|al|ala|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|
calif|capt|cf|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|ed\.d|ens|esq|
est|etc|ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|jan|jr|jul|jun|kan|kans|ky|
lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|natl|neb|
nev|nov|oct|okla|penn|pfc|ph|ph\.d|plc|pres|prof|profs|pte|ptes|ptys|pvt|rd|rep|reps|rev|sen|
sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|supts|sys|tel|tenn|thu|thurs|tue|tues|univ|va|
vs|vt|wed|wis|wisc|wyo"""
"""Words that keep their full stop."""
CAPITAL = r"Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
"""Words that keep it with a capital letter only."""
NUMBERED = r"art|ca|fig|figs|no|nos|op|pp|prop"
"""Words that keep it in front of a number."""
BEGINNINGS = r"""A|About|According|Additionally|After|An|As|At|But|He|Her|Here|However|If|In|It|Last|Many|More|
Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What|
When|While|Yet|You"""
"""Words in front of which a letter loses it: a sentence begins."""

_CHARACTERS = str.maketrans({
    "’": "'", "‘": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": " -- ", "—": " -- ", "…": " ... ", "£": "#",
    "€": "$", "¤": "$", "¢": " cents ", "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ",
})
_BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
                           " ": "\xa0"})
_END = r"(?![\p{L}\p{M}\p{Nd}])"
_TOKEN = regex.compile(rf"""
    ''
  | https?://\S*\w | www\.\S*\w | \w[\w.+-]*@\w(?:[\w.-]*\w)?                  # addresses
  | </?[a-z][^<>\s]*> | [:;=]-?(?:[()\\]|[DP](?!\w)) | [#]\p{{L}}+ | @\w+
  | '\d0s{_END} | '(?:em|till?|cause){_END} | 't(?=is{_END}|was{_END}) | 'n(?:'|{_END})
  | '(?:s|m|d|ll|re|ve){_END} | n't{_END}
  | (?:can(?=not)|gon(?=na)|wan(?=na)|got(?=ta)|lem(?=me)|gim(?=me))(?=\p{{L}}{{2,3}}{_END})
  | (?:s'mores|c'mon|li'l|cap'n|ol'|dunkin'|somethin'){_END} | \p{{L}}+[aeiouy]'[aeiou]\p{{L}}*
  | (?:[dlno]|(?-i:[A-HJ-XZ]))'\p{{L}}{{2,}} | [djly]'(?=\p{{L}})
  | (?:(?:\p{{L}}\.)+\p{{L}}|{ABBREVIATIONS}|(?-i:{CAPITAL}))\.{_END}
  | \p{{L}}\.{_END}(?!\s+(?-i:{BEGINNINGS}){_END})
  | (?:{NUMBERED})\.(?=\s*\d)
  | LA*\.(?=[,;:]) | (?-i:[A-Z]+(?:&[A-Z]+)+)
  | \d+[ -]\d+/\d+{_END}
  | [-+]?(?:\d*(?:[.,:]\d+)+ | (?<!\w)\d+{_END}(?![-/]))(?:-\p{{L}}+)*
  | (?:A+)??[\p{{L}}--n](?=n't{_END}) | LA*(?:[.!?]LA*)+ | A+(?:-A+)*(?:/A+(?:-LA*)*)* (?:_A+)*
  | \.{{2,}} | [!?]{{2,}} | -+ | \*+ | _+
  | [^\s"\p{{Cf}}\ufe00-\ufe0f\U00010000-\U0010ffff]
""".replace("LA*", r"\p{L}[\p{L}\p{M}\p{Nd}]*").replace("A+", r"[\p{L}\p{M}\p{Nd}]+"), regex.X | regex.I | regex.V1)


def ptb_tokens(caption: str) -> list[str]:
    """Return the caption's words in lower case, without punctuation."""
    tokens = (token.lower() for token in _TOKEN.findall(caption.translate(_CHARACTERS)))
    return [token.translate(_BRACKETS) for token in tokens
            if token not in DROPPED and not regex.fullmatch(r"\.+|-{1,4}|''", token)]
