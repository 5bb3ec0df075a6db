"""Ordinary English sentences as Kokoro's phonemes, for the figures of scripts/bench_adapters.

They were read with espeak-ng, American English.
"""

SENTENCES = """\
ðə mjuzˈiəm ˈOpənz æt tˈɛn, bˌʌt ðə ɡˈɑɹdən bᵻhˌInd ɪT ɪz ˈOpən ˈɔl dˈA.
kʊd ju tˈɛl mˌi wˌɪʧ plˈætfɔɹm ðə tɹˈAn tə bɹˈɪstᵊl lˈivz fɹʌm?
ʃi hæd nˈɛvəɹ sˈin sˌO mˈɛni bˈɜɹdz ɪn wˈʌn plˈAs bᵻfˈɔɹ.
ɪf ðə wˈɛðəɹ hˈOldz, wi wɪl wˈɔk əlˈɔŋ ðə ɹˈɪvəɹɹ ˈæftəɹ lˈʌnʧ.
nˈO, ðæt ɪz nˌɑt wʌt I mˈɛnt!
mI bɹˈʌðəɹ ɹᵻpˈɛɹd ðɪ ˈOld ɹˈAdɪˌO wɪð ə pˈis ʌv kˈɑpəɹ wˈIəɹ.
ðA bˈɔt ˈæpᵊlz, bɹˈɛd, ə lˈɪTᵊl ʧˈiz ænd tˈu bˈɑTᵊlz ʌv wˈɔTəɹ.
wˌI dˈɪd nˈObɑdi tˈɛl ˌʌs ðætðə mˈiTɪŋ hədbɪn mˈuvd?
ðə fˈɜɹst snˈO ʌvðə wˈɪntəɹ fˈɛl kwˈIətli dˈʊɹɹɪŋ ðə nˈIt.
plˈiz lˈiv jʊɹ wˈɛt ʃˈuz bI ðə dˈɔɹ.
ˈæftəɹ fˈɔɹTi jˈɪɹz æt sˈi, ðə kˈæptɪn kʊd ɹˈid ðə klˈWdz lˈIk ə bˈʊk.
wˌʌt ə stɹˈAnʤ θˈɪŋ tə sˈA.
ðə ɹɪzˈʌlts wɜɹ bˈɛTəɹ ðən ɛkspˈɛktᵻd; hWˈɛvəɹ, ðɪ ɛkspˈɛɹɪmənt həz təbi ɹᵻpˈiTᵻd.
nˈObɑdi nˈOz ɛɡzˈæktli hˌW ðə fˈIəɹ stˈɑɹTᵻd.
wˌɛn ðə bˈɛl ɹˈæŋ, ðə ʧˈɪldɹən ɹˈæn ˈWt ˌɪntʊ ðə jˈɑɹd ænd bɪɡˈæn tə ʃˈWt.
ɪt kˈɔsts lˈɛs ðˌænə kˈʌp ʌv kˈɔfi.
hi ˈOpənd ðə lˈɛTəɹ slˈOli, ɹˈid ɪt twˈIs, ænd pˌʊt ɪt bˈæk ˌɪntʊ ðə dɹˈɔɹ wɪðˌWt ə wˈɜɹd.
tˈɜɹn lˈɛft æt ðə bɹˈɪʤ ænd kˈip ɡˌOɪŋ ʌntˈɪl ju sˈi ðə ʧˈɜɹʧ.
I wʊd ɹˈæðəɹ stˈA æt hˈOm tənˈIt.
ðɪ ˈɛnʤɪn mˌAks ə lˈO hˈʌmɪŋ sˈWnd wɛnˌɛvəɹɹ ɪT ɪz kˈOld WtsˈId.
dˈu ju ɹˈiəli θˈɪŋk sˈO?
ə θˈɪn lˈAəɹɹ ʌv dˈʌst kˈʌvəɹd ðə bˈʊks ðæt hɜɹ ɡɹˈændfɑðəɹ hæd lˈɛft bᵻhˌInd ɪnðɪ ˈæTɪk.
ˈɛvɹi ˈænsəɹ wʌz ɹˈɪtn dˈWn, kˈWntᵻd ænd ʧˈɛkt bI tˈu dˈɪfɹənt pˈipᵊl.
ɡˈʊd mˈɔɹnɪŋ, hˌW kæn I hˈɛlp ju?
""".splitlines()
