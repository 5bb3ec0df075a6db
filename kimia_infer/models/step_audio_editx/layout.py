"""Where Step-Audio-EditX is published, and which files a directory of it has.

The directory holds the two published repositories under their names:

    Step-Audio-EditX/       config.json  tokenizer.json  model*.safetensors
        CosyVoice-300M-25Hz/    cosyvoice.yaml  flow.pt  hift.pt  campplus.onnx
    Step-Audio-Tokenizer/   linguistic_tokenizer.npy  speech_tokenizer_v1.onnx
        dengcunqin/speech_paraformer-.../   config.yaml  model.pt  am.mvn

PyTorch is not imported here, so that missing weights are reported at once.
"""

MODEL_FOLDER, TOKENIZER_FOLDER = "Step-Audio-EditX", "Step-Audio-Tokenizer"
SOUND_FOLDER = "CosyVoice-300M-25Hz"
RECOGNIZER_FOLDER = (
    "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
)
CENTERS_NAME, VQ06_NAME = "linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx"
SPEAKER_NAME = "campplus.onnx"
